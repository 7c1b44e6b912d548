"""Text data: loading documents, tokenizers, and packing tokens into blocks without padding."""

import logging
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import explained
from .streams import DocumentStream, PackedStream, cut

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("validation", "valid", "test")
END_OF_TEXT = "<|endoftext|>"
#: Parts of the standard library left out: tests, tables, and packages that not every installation has.
SKIPPED_PACKAGES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3", "idlelib", "distutils"}
)
TEXT_FILES = {".parquet": "parquet", ".txt": "text", ".json": "json", ".jsonl": "json"}

TextDatasets: TypeAlias = DatasetDict | IterableDatasetDict
Documents: TypeAlias = DatasetDict | dict[str, DocumentStream]


def load_text_dataset(
    name: str, config: str | None = None, streaming: bool = False, flag: str = "dataset_name"
) -> TextDatasets:
    """`python`, a text, parquet or JSON file, a folder of such files, or a Hub dataset: one document per row.

    `python` is the standard library of the running Python, one module per document, in the order of their paths. In a
    text file, a document is a paragraph: the lines between empty ones. `flag` is named in errors.
    """
    if name == "python":
        if config is not None:
            raise ValueError(f"dataset_config_name={config!r}: 'python' has no configurations. Leave it out.")
        return _load_standard_library(streaming)
    kind = TEXT_FILES.get(Path(name).suffix)
    if kind is not None and config is not None:
        raise ValueError(f"dataset_config_name={config!r}: a file has no configurations. Leave it out.")
    remedy = (
        "Give 'python' (embedded), a file (.txt, .parquet, .json, .jsonl), a folder of such files, or the name of a "
        "dataset on the Hub that can be reached from here."
    )
    with explained(f"{flag}={name!r} could not be loaded", remedy):
        if kind is not None:
            # By default each line would be a document, without its line break.
            options = {"sample_by": "paragraph"} if kind == "text" else {}
            return load_dataset(kind, data_files=name, streaming=streaming, **options)
        return load_dataset(name, config, streaming=streaming)


def _load_standard_library(streaming: bool) -> TextDatasets:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in folder.rglob("*.py") if SKIPPED_PACKAGES.isdisjoint(p.relative_to(folder).parts))
    # Each once: Debian's Python has a module under two names, of which one could be held out.
    documents = dict.fromkeys(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    dataset = Dataset.from_dict({"text": [text for text in documents if text.strip()]})
    # Adjacent modules belong to one package: every twentieth module is held out, not the last ones.
    held_out = range(0, len(dataset), 20)
    train = [i for i in range(len(dataset)) if i % 20]
    splits = {"train": dataset.select(train), "validation": dataset.select(held_out)}
    if streaming:
        return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    return DatasetDict(splits)


def features_of(dataset: TextDatasets) -> Features:
    """The columns and their types; if a stream does not declare them, those of its first row."""
    first = next(iter(dataset.values()))
    return first.features or Dataset.from_list(list(first.take(1))).features


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds strings."""
    return kind in (Value("string"), Value("large_string"))


def find_text_column(features: Features, name: str | None = None) -> str:
    """The column to take text from: `name`, or `text`, or the only one of type string."""
    columns, strings = ", ".join(features), [column for column, kind in features.items() if is_text(kind)]
    if name is not None and name not in features:
        raise ValueError(
            f"text_column_name={name!r} is not a column of the dataset, which has {columns}. Name one of these."
        )
    if name is None and "text" not in features:
        if len(strings) == 1:
            return strings[0]
        if strings:
            raise ValueError(
                f"The dataset has no column 'text'; its columns are {columns}. Name one with --text_column_name: "
                f"{', '.join(strings)} hold text."
            )
        raise ValueError(f"No column of the dataset holds text; its columns are {columns}. Give other data.")
    column = name or "text"
    if not is_text(features[column]):
        remedy = f"Name another with --text_column_name: {', '.join(strings)}." if strings else "Give other data."
        raise ValueError(f"text_column_name={column!r} holds {features[column]}, not text. {remedy}")
    return column


# ---- Examples that cannot be trained on ----


def used_splits(dataset: TextDatasets) -> list[str]:
    """`train`, and the evaluation split if there is one."""
    evaluation = [name for name in EVAL_SPLITS if name in dataset]
    return [name for name in ("train", *evaluation[:1]) if name in dataset]


def without_null_documents(dataset: TextDatasets, column: str, skipped: Counter[str] | None) -> Documents:
    """The splits in use, without rows that have no text in `column`.

    Args:
        skipped: counts such rows by split; if None, they are an error. Those of a stream are logged as it is read.
    """
    splits = {name: dataset[name] for name in used_splits(dataset)}
    if isinstance(dataset, IterableDatasetDict):
        return {name: DocumentStream(split, column, name, skipped is not None) for name, split in splits.items()}
    return DatasetDict(
        {name: leave_out(split, name, null_rows(split, [column]), skipped) for name, split in splits.items()}
    )


def null_rows(dataset: Dataset, columns: Iterable[str]) -> dict[int, str]:
    """A message for each row with a null in one of `columns`, by row number."""
    found: dict[int, str] = {}
    for column in columns:
        tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
        for i, table in enumerate(tables):
            rows = pc.indices_nonzero(pc.is_null(table[column])).to_numpy() + 10_000 * i
            found |= {row: f"column {column!r} is null" for row in rows.tolist() if row not in found}
    return dict(sorted(found.items()))


def leave_out(dataset: Dataset, split: str, bad: dict[int, str], skipped: Counter[str] | None) -> Dataset:
    """`dataset` without the rows in `bad`, a dict from row to reason; if `skipped` is None, they are an error."""
    if not bad:
        return dataset
    row, reason = next(iter(bad.items()))
    where = f"split {split!r}, row {row}: {reason}"
    count = f"{len(bad):,} of {len(dataset):,} examples"
    if skipped is None:
        raise ValueError(
            f"{where} ({count} are like that). Fix or remove them, or leave them out with --skip_bad_examples."
        )
    if len(bad) == len(dataset):
        raise ValueError(f"{where}, and so are all {len(bad):,} examples: none is left. Look at the data.")
    logger.warning(f"{where}. {count} are left out.")
    skipped[split] += len(bad)
    return dataset.select([row for row in range(len(dataset)) if row not in bad])


def skipped_metrics(skipped: Counter[str] | None, eval_split: str) -> dict[str, int]:
    """The numbers of examples left out, for the record of the run; empty if `skipped` is None."""
    if skipped is None:
        return {}
    return {"train_skipped_examples": skipped["train"], "eval_skipped_examples": skipped[eval_split]}


def require_train_split(dataset: Documents) -> None:
    """Raise `ValueError` if there is no split `train`."""
    if "train" not in dataset:
        raise ValueError(
            f"The dataset has no split 'train', only {', '.join(dataset)}. Name the files so, or choose another."
        )


def split_documents(
    dataset: Documents, eval_documents: int | None, seed: int, flag: str = "eval_documents"
) -> tuple[Any, Any, str]:
    """(train, evaluation, name of the evaluation split): whole documents, none of them in both.

    The evaluation split is the first of `validation`, `valid` and `test` that exists. If there is none, it is
    `eval_documents` documents of `train`, by default 1 %, drawn with `seed`; or the first ones of the shards of a
    stream, by default 1000, rounded up to the same number in each. `flag` is named in errors.
    """
    require_train_split(dataset)
    if eval_documents is not None and eval_documents < 1:
        raise ValueError(f"{flag}={eval_documents}: give at least 1, or leave it out.")
    train = dataset["train"]
    for name in EVAL_SPLITS:
        if name in dataset:
            if eval_documents is not None:
                raise ValueError(
                    f"{flag}={eval_documents} has no effect: the dataset has a split {name!r} to evaluate on. "
                    "Leave it out."
                )
            return train, dataset[name], name
    if isinstance(train, DocumentStream):
        shards = train.num_shards
        count = -(-(1000 if eval_documents is None else eval_documents) // shards)
        name = f"first {count} documents of " + ("train" if shards == 1 else f"each of the {shards} shards of train")
        return replace(train, first=count), replace(train, stop=count), name
    count = max(1, len(train) // 100) if eval_documents is None else eval_documents
    if count >= len(train):
        raise ValueError(
            f"{flag}={eval_documents}: train has {len(train)} documents, too few for both training and evaluation. "
            "Give more data, or a split to evaluate on."
        )
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"], f"{count} documents of train"


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one special token, the end of a document. It can encode any text."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level BPE has at least the 256 bytes and {END_OF_TEXT}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


# ---- Packing ----


def pack(
    documents: Dataset | DocumentStream,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    block_size: int,
    num_proc: int | None = None,
    seed: int = 0,
) -> Dataset | PackedStream:
    """Blocks of `block_size` tokens: the documents one after the other, each followed by the end-of-text token.

    No token is lost or repeated, but an incomplete last block is dropped. There is no padding, so every position but
    the first of a block is predicted. `num_proc` processes tokenize the documents. A stream is tokenized as it is read,
    shuffled with `seed`, and endless.

    Returns:
        a dataset with the columns `input_ids` and `labels`, which are equal.

    Raises:
        ValueError: the tokens do not fill one block, or the tokenizer has no end-of-text token.
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: must be at least 2, a token and the one that follows it.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token (eos_token), which separates documents. Set one.")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[text_column] if text]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return {"input_ids": [[*row, tokenizer.eos_token_id] for row in ids]}

    if isinstance(documents, DocumentStream):
        stream = PackedStream(documents, tokenizer, block_size, seed)
        if len(stream.take(1)) == 0:
            raise ValueError(
                f"block_size={block_size}: the stream has fewer tokens than that, apart from documents set aside for "
                "evaluation. Look at the data, or set aside fewer."
            )
        return stream
    features = Features({name: List(Value("int32"), length=block_size) for name in ("input_ids", "labels")})
    documents = documents.select_columns([text_column])
    tokens = documents.map(tokenize, batched=True, remove_columns=[text_column], num_proc=num_proc, desc="Tokenizing")
    if next(_blocks(tokens, block_size), None) is None:
        raise ValueError(
            f"block_size={block_size}: the {len(documents):,} documents have fewer tokens than that together. Look at "
            "the data, or give a smaller block_size."
        )
    return Dataset.from_generator(_blocks, gen_kwargs={"tokens": tokens, "block_size": block_size}, features=features)


def _blocks(tokens: Dataset, block_size: int) -> Iterator[dict[str, np.ndarray]]:
    batches = tokens.with_format("arrow").iter(batch_size=1000)
    for block in cut((table["input_ids"].combine_chunks().flatten().to_numpy() for table in batches), block_size):
        yield {"input_ids": block, "labels": block}
