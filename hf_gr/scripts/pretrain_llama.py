"""Pretrain a Llama with AdmIRE, AdamW or any other optimizer, with or without gradient regularization.

    accelerate launch scripts/pretrain_llama.py                                 # a small one, on Python's own library
    accelerate launch scripts/pretrain_llama.py --ire_kappa 0                   # the same with AdamW alone
    accelerate launch scripts/pretrain_llama.py llama_60m_wikitext103.yaml
    accelerate launch scripts/pretrain_llama.py --dataset_name FILE_FOLDER_OR_HUB_NAME --model llama-60m

Where hf_gr is installed, `hf-gr llama` is the same command.

A recipe (YAML or JSON) may come first; flags override it, along with whatever in it contradicts them. The default
recipe is llama_tiny_python.yaml. With --dataset_name, or a recipe that does not set the method, only its method (gr_*,
ire_*, optim*) is used: the data never changes the method.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase, default_data_collator

from ..analysis.forgetting import FineTuning
from ..checks import COUNT, POSITIVE, Limit, check_ranges, flag
from ..cli import forgetting, script
from ..cli.script import ScriptConfig
from ..cli.shipped import RECIPES
from ..cli.trainers import CausalLMTrainer, steps_for_tokens
from ..data.images import keep_first
from ..data.streams import DocumentStream, PackedStream
from ..data.text import (
    features_of,
    find_text_column,
    load_text_dataset,
    pack,
    skipped_metrics,
    split_documents,
    train_tokenizer,
    without_null_documents,
)
from ..errors import explained, extra
from ..evaluation import generate_text
from ..models.presets import LLAMA_PRESETS, create_llama

with extra("scripts"):
    from datasets import Dataset

DEFAULT_RECIPE = RECIPES / "llama_tiny_python.yaml"
#: Of `FineTuning`; the flags have forgetting_ in front.
FORGETTING = ("target_loss", "learning_rate", "max_steps", "eval_steps")


@dataclass
class ModelArguments(script.ModelArguments):
    model: str = flag("llama-tiny", "Architecture to train from scratch.", LLAMA_PRESETS)
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer of a checkpoint, on the Hub or in a folder. Default: one trained on the data."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Size of the byte-level BPE trained on the data. Default: 4096."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per example. Default: the context of the architecture."}
    )

    def __post_init__(self):
        check_ranges(self, {"vocab_size": Limit(257)})
        if self.tokenizer_name is not None:
            script.refuse(self, ("vocab_size",), f"tokenizer_name={self.tokenizer_name!r}, which has its own")
        context = LLAMA_PRESETS[self.model].context
        if self.block_size is not None and not 1 < self.block_size <= context:
            raise ValueError(
                f"block_size={self.block_size}: {self.model} has a context of {context} tokens; give 2 to {context}."
            )


@dataclass
class DataArguments(script.DataArguments):
    dataset_name: str = field(
        default="python",
        metadata={"help": "'python' (embedded), a text, parquet or JSON file, a folder, or a name on the Hub."},
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "Default: 'text', or the only column of strings."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as needed, without storing it."})
    eval_documents: int | None = field(
        default=None,
        metadata={
            "help": "Documents of train to evaluate on, if there is no validation or test split. Default: one in 100."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Number of tokenizing processes."})
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "Train on this many tokens, instead of epochs or steps."}
    )
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Evaluate on at most this many blocks."})
    sample_prompt: str = field(default="", metadata={"help": "The beginning of the sample of generated text."})
    final_forgetting: str | None = field(
        default=None,
        metadata={
            "help": "After training, measure what the model forgets when it is fine-tuned on this dataset. "
            "As evaluate_forgetting.py does; the results have forgetting, forgetting_steps and so on. Needs "
            "forgetting_target_loss."
        },
    )
    forgetting_target_loss: float | None = field(
        default=None, metadata={"help": "The fine-tuning loss at which final_forgetting compares."}
    )
    forgetting_learning_rate: float | None = field(
        default=None, metadata={"help": f"That of fine-tuning, fixed. Default: {FineTuning.learning_rate:g}."}
    )
    forgetting_max_steps: int | None = field(
        default=None, metadata={"help": f"Fine-tune for at most this many steps. Default: {FineTuning.max_steps}."}
    )
    forgetting_eval_steps: int | None = field(
        default=None, metadata={"help": f"Steps between two measurements. Default: {FineTuning.eval_steps}."}
    )

    def __post_init__(self):
        self._check_forgetting()
        counts = ("eval_documents", "preprocessing_num_workers", "max_train_tokens", "max_eval_blocks")
        check_ranges(self, dict.fromkeys(counts, COUNT))
        if self.streaming:
            reason = "streaming=True: a stream is tokenized as it is read"
            script.refuse(self, ("preprocessing_num_workers",), reason)

    def _check_forgetting(self) -> None:
        check_ranges(self, dict.fromkeys(("forgetting_max_steps", "forgetting_eval_steps"), COUNT))
        check_ranges(self, dict.fromkeys(("forgetting_target_loss", "forgetting_learning_rate"), POSITIVE))
        if self.final_forgetting is None:
            script.refuse(self, [f"forgetting_{name}" for name in FORGETTING], "final_forgetting=None")
        elif self.forgetting_target_loss is None:
            raise ValueError(
                f"final_forgetting={self.final_forgetting!r}: models are compared at an equal fine-tuning loss. Give "
                "forgetting_target_loss, or compare the saved models with evaluate_forgetting.py instead."
            )
        elif self.final_forgetting == self.dataset_name:
            raise ValueError(
                f"final_forgetting={self.final_forgetting!r}: these are the pretraining data. Give others."
            )


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, ScriptConfig]:
    kinds = (ModelArguments, DataArguments, ScriptConfig)
    return script.parse_args(kinds, argv, DEFAULT_RECIPE, without_it=("dataset_name",))


def create_tokenizer(args: ModelArguments, documents, text_column: str) -> PreTrainedTokenizerBase:
    if args.tokenizer_name is not None:
        remedy = "Give a folder that a tokenizer was saved to, or a name on the Hub."
        with explained(f"tokenizer_name={args.tokenizer_name!r} could not be loaded", remedy):
            return AutoTokenizer.from_pretrained(args.tokenizer_name)
    if isinstance(documents, DocumentStream):
        texts: Iterable[str] = islice(documents, 10_000)
    else:
        texts = (row[text_column] for row in documents.select_columns([text_column]))
    context = LLAMA_PRESETS[args.model].context
    return train_tokenizer(texts, 4096 if args.vocab_size is None else args.vocab_size, context)


def tokens_per_example(model_args: ModelArguments, data_args: DataArguments, args: ScriptConfig) -> int:
    """The block size. Also converts a token budget to `max_steps`."""
    context, size = LLAMA_PRESETS[model_args.model].context, model_args.block_size
    block_size = context if size is None else size
    if data_args.max_train_tokens is not None:
        args.max_steps = steps_for_tokens(data_args.max_train_tokens, args, block_size)
    elif data_args.streaming and args.max_steps <= 0:
        raise ValueError("streaming=True: a stream has no known length. Set max_train_tokens or max_steps.")
    return block_size


class Data(NamedTuple):
    train: Dataset | PackedStream
    evaluation: Dataset
    eval_split: str
    tokenizer: PreTrainedTokenizerBase
    counts: dict[str, int]  # skipped examples, as metrics; a stream logs them


def load_data(model_args: ModelArguments, args: DataArguments, training: ScriptConfig, block_size: int) -> Data:
    skipped: Counter[str] | None = Counter() if args.skip_bad_examples else None
    dataset = load_text_dataset(args.dataset_name, args.dataset_config_name, args.streaming)
    text_column = find_text_column(features_of(dataset), args.text_column_name)
    dataset = without_null_documents(dataset, text_column, skipped)
    train, evaluation, eval_split = split_documents(dataset, args.eval_documents, training.seed)
    tokenizer = create_tokenizer(model_args, train, text_column)
    train, evaluation = (
        pack(documents, tokenizer, text_column, block_size, args.preprocessing_num_workers, training.seed)
        for documents in (train, evaluation)
    )
    if isinstance(evaluation, PackedStream):
        evaluation = evaluation.take(1000 if args.max_eval_blocks is None else args.max_eval_blocks)
        return Data(train, evaluation, eval_split, tokenizer, {})
    evaluation = keep_first(evaluation, args.max_eval_blocks, training.seed, "max_eval_blocks")
    return Data(train, evaluation, eval_split, tokenizer, skipped_metrics(skipped, eval_split))


def load_second_data(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> forgetting.FineTuningData | None:
    """The data of `final_forgetting`: before training, so that a mistake in it costs nothing."""
    if args.final_forgetting is None:
        return None
    how = (tokenizer, block_size, forgetting.MAX_EXAMPLES, FineTuning.seed)
    return forgetting.load_finetuning_data(args.final_forgetting, None, *how, flag="final_forgetting")


def create_trainer(model_args: ModelArguments, args: ScriptConfig, data: Data) -> CausalLMTrainer:
    args.include_num_input_tokens_seen = "all"  # logs tokens, and tokens per second
    context = LLAMA_PRESETS[model_args.model].context
    return CausalLMTrainer(
        model=create_llama(model_args.model, len(data.tokenizer), context, data.tokenizer.eos_token_id),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,  # blocks of equal length need no padding
    )


def forgetting_of(
    trainer: CausalLMTrainer, args: DataArguments, data: Data, second: forgetting.FineTuningData
) -> dict[str, float]:
    """Of the saved model, measured by the main process."""
    given = {name: getattr(args, f"forgetting_{name}") for name in FORGETTING}
    how = FineTuning(**{name: value for name, value in given.items() if value is not None})
    return forgetting.at_end(trainer.args, data.evaluation, second, how) if trainer.is_world_process_zero() else {}


def in_words(name: str, data: Data, block_size: int) -> str:
    if isinstance(data.train, PackedStream):
        return f"{name}, streamed in blocks of {block_size} tokens, a vocabulary of {len(data.tokenizer):,}"
    return (
        f"{name}, {len(data.train):,} training blocks of {block_size} tokens, a vocabulary of {len(data.tokenizer):,}; "
        f"{len(data.evaluation):,} blocks to evaluate on"
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_args(argv)
    with script.claim(args):
        block_size = tokens_per_example(model_args, data_args, args)
        with args.main_process_first(desc="preparing the data"):
            data = load_data(model_args, data_args, args, block_size)
            second = load_second_data(data_args, data.tokenizer, block_size)
        trainer = create_trainer(model_args, args, data)
        script.begin(trainer, model_args, data_args, data=in_words(data_args.dataset_name, data, block_size))
        further = {} if second is None else {"forgetting": lambda: forgetting_of(trainer, data_args, data, second)}
        metrics = script.train(trainer, data.counts, further=further)
        prompt = data_args.sample_prompt
        sample = generate_text(trainer.model, data.tokenizer, prompt, seed=args.seed, temperature=0.8)
        if trainer.is_world_process_zero():
            print(f"\n{prompt}{sample}\n")
            print(f"Perplexity {metrics['eval_perplexity']:.2f} (loss {metrics['eval_loss']:.3f} per token).")
        script.publish(
            trainer,
            data_args.dataset_name,
            embedded={"python": "the source of Python's standard library"},
            tasks="text-generation",
            dataset_args=data.eval_split,
            started=(__file__, argv),
            sample=(prompt, sample),
        )


if __name__ == "__main__":
    script.run(main)
