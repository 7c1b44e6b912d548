"""What scripts that evaluate checkpoints share: how they are recognized and loaded, with the data of their runs."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checks import COUNT, POSITIVE, check_ranges
from ..data.images import (
    IS_WRONG,
    find_image_column,
    find_label_column,
    keep_first,
    keep_readable,
    load_image_dataset,
    number_rows,
    part_to_train_on,
    preprocess,
    split_train_eval,
)
from ..data.streams import PackedStream
from ..data.text import (
    features_of,
    find_text_column,
    load_text_dataset,
    pack,
    split_documents,
    without_null_documents,
)
from ..errors import explained, extra
from ..models import presets  # noqa: F401  makes its own architectures known to AutoModel
from ..reporting.record import read_record
from . import script

with extra("scripts"):
    from datasets import Dataset

REMEDY = "Give a folder with a model (adapters: merged into theirs), or a name on the Hub."
#: Tokens per example for a model with a longer context, unless its run had others.
MAX_BLOCK_SIZE = 1024
#: Examples of a stream, unless --max_examples is given; as in pretrain_llama.py.
MAX_STREAMED_EXAMPLES = 1000


#: The flags of `part_to_train_on`, and all settings of a run that describe its own dataset.
TRAINING_PART = ("label_noise", "label_noise_type", "validation_fraction")
OF_THE_DATA = ("eval_fraction", "eval_documents", "streaming", "max_train_samples", *TRAINING_PART)


class Checkpoint(NamedTuple):
    """A loaded checkpoint, and the settings of its run as far as they are known."""

    name: str
    model: PreTrainedModel
    settings: dict[str, Any]

    def held_out(self, size: str) -> tuple[Any, int]:
        """(size, seed) of the evaluation data that the run drew. `size` is the name of the flag; None: its default."""
        return self.settings.get(size), self.settings.get("seed", 42)


class Kind(NamedTuple):
    """A kind of model: how its checkpoints are recognized and loaded.

    Attributes:
        marks: one of them is in the name of the architecture.
        flags: those without effect on other kinds.
    """

    name: str
    marks: tuple[str, ...]
    auto_class: Any
    default_dataset: str
    default_batch_size: int
    flags: tuple[str, ...]
    load_data: Callable[[Checkpoint, argparse.Namespace, bool], tuple[Dataset, str]]

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of the trained model; of a language model, per token."""
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        if "labels" not in inputs:
            inputs["labels"] = inputs["input_ids"]
        return model(**inputs).loss


# ---- Image classifiers ----


def load_images(checkpoint: Checkpoint, options: argparse.Namespace, is_training: bool = False) -> tuple[Dataset, str]:
    """The classifier's inputs, not augmented, and the name of their split."""
    images, split, _ = images_of(checkpoint, options, is_training, checkpoint.model.config.num_labels)
    return images, split


def images_of(
    checkpoint: Checkpoint, options: argparse.Namespace, is_training: bool = False, classes: int | None = None
) -> tuple[Dataset, str, list[str]]:
    """As `load_images`, for a model with any head or none; and the names of the classes.

    Args:
        classes: what the dataset must have; None: any number.
    """
    dataset = load_image_dataset(options.dataset_name, options.dataset_config_name)
    features = next(iter(dataset.values())).features
    image_column = find_image_column(features, options.image_column_name)
    label_column, label_names = find_label_column(features, options.label_column_name)
    if classes not in (None, len(label_names)):
        raise ValueError(
            f"checkpoint={checkpoint.name!r} has {classes} classes, dataset_name={options.dataset_name!r} "
            f"{len(label_names)}. Give the dataset that the model was trained on."
        )
    skipped: Counter[str] | None = Counter() if options.skip_bad_examples else None
    held_out = checkpoint.held_out("eval_fraction")
    training, images, split = split_train_eval(number_rows(dataset), label_column, *held_out, skipped)
    settings, seed = checkpoint.settings, checkpoint.settings.get("seed", 42)
    if is_training:
        images, split = keep_first(training, settings.get("max_train_samples"), seed, "max_train_samples"), "train"
    else:
        images = keep_first(images, options.max_examples, options.seed, "max_examples")
    if skipped is not None:
        images = keep_readable(images, split, skipped, image_column, options.image_max_value)
    if is_training:
        how = {key: settings[key] for key in TRAINING_PART if key in settings}
        images, _ = part_to_train_on(images, label_column, seed, **how)
        images = keep_first(images, options.max_examples, options.seed, "max_examples")
        images = images.remove_columns([name for name in (IS_WRONG,) if name in images.column_names])
    with explained(f"checkpoint={checkpoint.name!r}: its image processor could not be loaded", REMEDY):
        image_processor = AutoImageProcessor.from_pretrained(checkpoint.name)
    inputs = preprocess(images, image_processor, image_column, label_column, split, options.image_max_value)
    return inputs, split, label_names


# ---- Causal language models ----


def load_blocks(checkpoint: Checkpoint, options: argparse.Namespace, is_training: bool = False) -> tuple[Dataset, str]:
    """Blocks of tokens, and the name of their split."""
    is_stream = checkpoint.settings.get("streaming", False)  # of which other documents are held out
    dataset = load_text_dataset(options.dataset_name, options.dataset_config_name, is_stream)
    column = find_text_column(features_of(dataset), options.text_column_name)
    dataset = without_null_documents(dataset, column, Counter() if options.skip_bad_examples else None)
    training, documents, split = split_documents(dataset, *checkpoint.held_out("eval_documents"))
    if is_training:
        documents, split = training, "train"
    blocks = pack(documents, load_tokenizer(checkpoint), column, block_size(checkpoint, options.block_size))
    if isinstance(blocks, PackedStream):
        return blocks.take(options.max_examples or MAX_STREAMED_EXAMPLES), split
    return keep_first(blocks, options.max_examples, options.seed, "max_examples"), split


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    with explained(f"checkpoint={checkpoint.name!r}: its tokenizer could not be loaded", REMEDY):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.name)
    rows = cast(nn.Embedding, checkpoint.model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"checkpoint={checkpoint.name!r}: its tokenizer has {len(tokenizer)} tokens, but the model embeddings for "
            f"{rows}. They do not belong together."
        )
    return tokenizer


def block_size(checkpoint: Checkpoint, size: int | None) -> int:
    """`size`, or by default that of the run, or the model's context up to `MAX_BLOCK_SIZE`."""
    context = getattr(checkpoint.model.config, "max_position_embeddings", None) or MAX_BLOCK_SIZE
    if size is None:
        return checkpoint.settings.get("block_size") or min(context, MAX_BLOCK_SIZE)
    if not 1 < size <= context:
        raise ValueError(
            f"block_size={size}: {checkpoint.name} has a context of {context} tokens; give 2 to {context}."
        )
    return size


# ---- Both ----

IMAGE_FLAGS = ("image_column_name", "label_column_name", "image_max_value")
IMAGES = Kind("an image classifier", ("ForImageClassification",), AutoModelForImageClassification, "digits", 64,
              IMAGE_FLAGS, load_images)  # fmt: skip
TEXT_FLAGS = ("text_column_name", "block_size")
TEXT = Kind("a causal language model", ("ForCausalLM", "LMHeadModel"), AutoModelForCausalLM, "python", 8, TEXT_FLAGS,
            load_blocks)  # fmt: skip
KINDS = (IMAGES, TEXT)


def kind_of(name: str) -> Kind:
    with explained(f"checkpoint={name!r} could not be loaded", REMEDY):
        architectures = AutoConfig.from_pretrained(name).architectures or ["of no architecture"]
    for kind in KINDS:
        if any(mark in architectures[0] for mark in kind.marks):
            return kind
    raise ValueError(f"checkpoint={name!r} is {architectures[0]}. Give an image classifier or a causal language model.")


def refuse_repeated(names: list[str]) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"checkpoint={repeated[0]!r} is given twice. Give it once.")


def common_kind(names: list[str]) -> Kind:
    refuse_repeated(names)
    kinds = {name: kind_of(name) for name in names}
    first = kinds[names[0]]
    if others := [name for name, kind in kinds.items() if kind is not first]:
        raise ValueError(
            f"checkpoint={others[0]!r} is {kinds[others[0]].name}, but {names[0]!r} is {first.name}. Evaluate "
            "each kind by itself."
        )
    return first


def settings_of(name: str, dataset_name: str) -> dict[str, Any]:
    """The settings of the run whose output folder is `name`; empty if it has no record.

    Those that describe its data are left out if the run's dataset was another one.
    """
    record = read_record(name)
    if record is None or not record.recorded:
        return {}
    path = Path(dataset_name)
    is_same = record.data.get("dataset_name") == (path.resolve().name if path.exists() else dataset_name)
    left_out = () if is_same else OF_THE_DATA
    return {flag: value for flag, value in record.recorded[-1].settings.items() if flag not in left_out}


def load_checkpoint(name: str, kind: Kind, options: argparse.Namespace) -> Checkpoint:
    """The model of `name` in float32, on the device."""
    with explained(f"checkpoint={name!r} could not be loaded", REMEDY):
        model = kind.auto_class.from_pretrained(name, dtype="float32")
    with explained(f"device={options.device!r} cannot be used", "Give cpu, or cuda where there is a GPU."):
        model.to(options.device)
    return Checkpoint(name, model, settings_of(name, options.dataset_name))


# ---- The command line ----


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", help="output folders of training scripts, or names on the Hub")


def add_data(parser: argparse.ArgumentParser, output: str, kinds: Sequence[Kind] = KINDS) -> None:
    """Add the flags of the data of `kinds` and of the device, and --output_dir for files named `output`."""
    parser.add_argument("--dataset_name", help="as for the training scripts (default: digits; for Llamas, python)")
    parser.add_argument("--dataset_config_name")
    if IMAGES in kinds:
        parser.add_argument("--image_column_name", help="default: the column of type Image")
        parser.add_argument("--label_column_name", help="default: the column of type ClassLabel")
        parser.add_argument("--image_max_value", type=float, help="value of white in images of more than 8 bits")
    parser.add_argument("--text_column_name", help="default: text, or the only column of strings")
    parser.add_argument("--block_size", type=int, help="tokens per example (default: as in training)")
    parser.add_argument("--max_examples", type=int, help="evaluate on at most this many images or blocks of tokens")
    parser.add_argument("--skip_bad_examples", action="store_true", help="skip what cannot be read")
    parser.add_argument("--batch_size", type=int, help="default: 64 images, or 8 blocks of tokens")
    parser.add_argument("--output_dir", help=f"where to write {output}.json and {output}.md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_data(options: argparse.Namespace) -> None:
    """Raise `ValueError` for a flag of `add_data` that is out of range."""
    check_ranges(options, dict.fromkeys(("block_size", "max_examples", "batch_size"), COUNT))
    check_ranges(options, {"image_max_value": POSITIVE, "seed": script.LIMITS["seed"]})


def resolve_kind(options: argparse.Namespace, kinds: Sequence[Kind] = KINDS) -> Kind:
    """The kind of all checkpoints, one of `kinds`, with its defaults filled in.

    Raises:
        ValueError: it is another kind, or a flag of another kind is set.
    """
    kind = common_kind(options.checkpoints)
    if kind not in kinds:
        raise ValueError(f"checkpoint={options.checkpoints[0]!r} is {kind.name}. Give {kinds[0].name}.")
    for other in kinds:
        script.refuse(options, other.flags if other is not kind else (), kind.name)
    if options.dataset_name is None:
        options.dataset_name = kind.default_dataset
    if options.batch_size is None:
        options.batch_size = kind.default_batch_size
    return kind


def labels(names: list[str]) -> dict[str, str]:
    """What a column is called after its metric: nothing, the folder's name, or, if two are equal, its path."""
    folders = {name: Path(name).name for name in names}
    if len(set(folders.values())) < len(names):
        folders = {name: name for name in names}
    return {name: f", {folder}" if len(names) > 1 else "" for name, folder in folders.items()}
