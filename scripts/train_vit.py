"""Train a vision transformer for image classification with gradient regularization.

    accelerate launch scripts/train_vit.py                                      # a small ViT on scans of digits
    accelerate launch scripts/train_vit.py --gr_lambda 0                        # the same without GR
    accelerate launch scripts/train_vit.py scripts/recipes/vit_ti_cifar10.yaml --seed 1
    accelerate launch scripts/train_vit.py --dataset_name PATH_OR_HUB_NAME --model vit-s --output_dir out

A recipe (YAML or JSON) may come first; flags overrule it. Without a recipe and without --dataset_name the recipe is
scripts/recipes/vit_digits.yaml.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.image_processing_utils import BaseImageProcessor

from hf_gr import GRConfig, GRTrainer
from hf_gr.data import (
    add_augmentation,
    find_image_column,
    find_label_column,
    keep_first,
    load_image_dataset,
    preprocess,
    split_train_eval,
)
from hf_gr.metrics import classification_metrics, rank_classes
from hf_gr.models import VIT_PRESETS, create_vit

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "vit_digits.yaml"


@dataclass
class ModelArguments:
    model: str = field(
        default="vit-ti", metadata={"help": "Architecture to train from scratch.", "choices": list(VIT_PRESETS)}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained checkpoint to start from, on the Hub or in a folder, in place of --model."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout of a model that is trained from scratch."})


@dataclass
class DataArguments:
    dataset_name: str = field(
        default="digits",
        metadata={"help": "'digits' (embedded), a name on the Hub, a local folder, or a parquet file."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: the column of type Image."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: the column of type ClassLabel."})
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of train to evaluate on, where there is no test or validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many examples only."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels per side. Default: that of the architecture or of the checkpoint."}
    )
    image_mean: list[float] = field(
        default_factory=lambda: [0.5, 0.5, 0.5], metadata={"help": "Subtracted per channel; a checkpoint brings its own."}
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.5, 0.5, 0.5], metadata={"help": "Divided by per channel; a checkpoint brings its own."}
    )
    random_flip: bool = field(default=True, metadata={"help": "Mirror training images at random."})
    crop_padding: int = field(
        default=4, metadata={"help": "Shift training images by up to this many pixels, filled by reflection; 0 is off."}
    )


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, GRConfig]:
    """The three sets of arguments from an optional recipe and the flags that overrule it."""
    parser = HfArgumentParser((ModelArguments, DataArguments, GRConfig))
    recipe = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe, *argv = argv
    elif not any(flag.split("=")[0].replace("-", "_") == "__dataset_name" for flag in argv):
        recipe = DEFAULT_RECIPE
    if recipe is not None:
        defaults = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))  # JSON is YAML, too
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(defaults) - known):
            raise ValueError(f"{recipe}: unknown argument {', '.join(unknown)}; see --help for the known ones.")
        parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)


def create_model(
    args: ModelArguments, data: DataArguments, label_names: list[str]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and the image processor that belongs to it."""
    if args.model_name_or_path is not None:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            id2label=dict(enumerate(label_names)),
            label2id={name: i for i, name in enumerate(label_names)},
            ignore_mismatched_sizes=True,
        )
        return model, AutoImageProcessor.from_pretrained(args.model_name_or_path)
    model = create_vit(args.model, label_names, data.image_size, args.dropout)
    size = {"height": model.config.image_size, "width": model.config.image_size}
    return model, ViTImageProcessorPil(size=size, image_mean=data.image_mean, image_std=data.image_std)


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, args = parse_args(sys.argv[1:] if argv is None else argv)
    args.remove_unused_columns = False  # the image column is read when an example is asked for
    args.label_names = ["labels"]
    set_seed(args.seed)

    with args.main_process_first(desc="loading the data"):
        dataset = load_image_dataset(data_args.dataset_name, data_args.dataset_config_name)
    features = next(iter(dataset.values())).features
    image_column = find_image_column(features, data_args.image_column_name)
    label_column, label_names = find_label_column(features, data_args.label_column_name)
    train, evaluation, eval_split = split_train_eval(dataset, label_column, data_args.eval_fraction, args.seed)
    train = keep_first(train, data_args.max_train_samples, args.seed)
    evaluation = keep_first(evaluation, data_args.max_eval_samples, args.seed)

    model, image_processor = create_model(model_args, data_args, label_names)
    add_augmentation(model, flip=data_args.random_flip, crop_padding=data_args.crop_padding)
    trainer = GRTrainer(
        model=model,
        args=args,
        train_dataset=preprocess(train, image_processor, image_column, label_column),
        eval_dataset=preprocess(evaluation, image_processor, image_column, label_column),
        processing_class=image_processor,
        compute_metrics=classification_metrics,
        preprocess_logits_for_metrics=rank_classes,
    )

    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    print(result.metrics, metrics)


if __name__ == "__main__":
    main()
