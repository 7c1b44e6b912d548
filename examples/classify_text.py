"""Fine-tune an encoder to classify text, with `GRTrainer` in the place of `Trainer`.

    python examples/classify_text.py                                        # a small BERT, made and trained on the spot
    python examples/classify_text.py --gr_lambda 0 --output_dir out/plain   # the same without GR
    python examples/classify_text.py --model_name_or_path google-bert/bert-base-uncased --dataset_name reviews.csv

Without `--dataset_name` the texts are the bodies of functions of Python's standard library, and the labels the packages
that they are from. A CSV or JSON file needs the columns `text` and `label`.
"""

import ast
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_gr import GRConfig, GRTrainer

PACKAGES = ("asyncio", "ctypes", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
SPECIAL_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TOKENS = 64


@dataclass
class Arguments:
    """What to train on what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: a BERT of two layers."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "A CSV or JSON file. Default: functions of Python."}
    )


@dataclass
class Config(GRConfig):
    """`GRConfig` with defaults for the small BERT."""

    output_dir: str | None = "outputs/classify-text"
    num_train_epochs: float = 5
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: float = 0.1
    gr_r: float = 0.05
    eval_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    save_strategy: str = "no"
    report_to: str = "none"


def functions_of_the_standard_library() -> Dataset:
    """Rows of `text`, the source of a function without its name, and `label`, its package."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for package in PACKAGES:
        for path in sorted((folder / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
            bodies = ("\n".join(map(ast.unparse, node.body)) for node in functions)
            rows += [{"text": body, "label": package} for body in bodies if len(body) > 100]
    return Dataset.from_list(rows)


def load(name: str | None, seed: int) -> DatasetDict:
    if name is None:
        dataset = functions_of_the_standard_library()
    else:
        kind = Path(name).suffix.removeprefix(".").replace("jsonl", "json")
        if kind not in ("csv", "json"):
            raise ValueError(f"dataset_name={name!r}: give a CSV or JSON file with columns text and label.")
        dataset = load_dataset(kind, data_files=name, split="train")
        if missing := {"text", "label"}.difference(dataset.column_names):
            raise ValueError(f"dataset_name={name!r} has no column {' and no '.join(sorted(missing))}. Rename one.")
    return dataset.class_encode_column("label").train_test_split(0.2, seed=seed, stratify_by_column="label")


def load_model(name: str | None, data: DatasetDict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    names = data["train"].features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if name is not None:
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            **labels,
            num_labels=len(names),
            ignore_mismatched_sizes=True,  # the head may be for other classes
        )
        return model, AutoTokenizer.from_pretrained(name)
    untrained = BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL_WORDS)})
    tokenizer = untrained.train_new_from_iterator(data["train"]["text"], vocab_size=2000, show_progress=False)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape, **labels)
    return BertForSequenceClassification(config), tokenizer


def measure(prediction) -> dict[str, float]:
    return {"error": float(np.mean(prediction.predictions.argmax(-1) != prediction.label_ids))}


def main(argv: list[str]) -> dict[str, float]:
    arguments, config = HfArgumentParser((Arguments, Config)).parse_args_into_dataclasses(argv)
    set_seed(config.seed)
    data = load(arguments.dataset_name, config.seed)
    model, tokenizer = load_model(arguments.model_name_or_path, data)
    tokens = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS),
        batched=True,
        remove_columns="text",
    )
    trainer = GRTrainer(
        model=model,
        args=config,
        train_dataset=tokens["train"],
        eval_dataset=tokens["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=measure,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    most = max(Counter(data["test"]["label"]).values()) / len(data["test"])
    print(f"Error {metrics['eval_error']:.1%}; always the most frequent class: {1 - most:.1%}.")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
