"""A stream of which each block is one document, so that the documents trained on can be read off the batches."""

from typing import Any

import torch
from datasets import Dataset

from helpers import toys
from hf_gr import GRConfig
from hf_gr.cli.trainers import CausalLMTrainer
from hf_gr.data.streams import DocumentStream, PackedStream

DOCUMENTS = 120


class Numbers:
    """The tokenizer of texts that are numbers: two digits to the base of 40, and an end."""

    eos_token_id = 0

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        self.seen += map(int, texts)
        return {"input_ids": [[1 + int(text) // 40, 1 + int(text) % 40] for text in texts]}


def numbers(shards: int = 5) -> PackedStream:
    """Documents "0", "1", ..., of three tokens, as long as a block, shuffled in windows of 4."""
    documents = Dataset.from_dict({"text": [str(i) for i in range(DOCUMENTS)]}).to_iterable_dataset(num_shards=shards)
    return PackedStream(DocumentStream(documents, "text"), Numbers(), block_size=3, seed=1, window=4)


class Watched(CausalLMTrainer):
    """Keeps the documents of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.documents: list[list[int]] = []

    def get_batch_samples(self, *args, **kwargs) -> tuple:
        batches, count = super().get_batch_samples(*args, **kwargs)
        ids = torch.cat([batch["input_ids"] for batch in batches])
        self.documents.append((40 * (ids[:, 0] - 1) + ids[:, 1] - 1).tolist())
        return batches, count


def train(output_dir: str, resume: str | None = None, data: PackedStream | None = None, **flags) -> Watched:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gr_lambda": 0, "learning_rate": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "ddp_backend": None, **flags}
    args = GRConfig(**toys.arguments(output_dir, **settings))
    trainer = Watched(model=toys.llama(dropout=0.3), args=args, train_dataset=numbers() if data is None else data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
