"""Pretrain an image model without labels, by Barlow Twins, with any optimizer, GR and IRE.

    accelerate launch scripts/pretrain_barlow_twins.py                          # a small ResNet on scans of digits
    accelerate launch scripts/pretrain_barlow_twins.py --optim lars             # the same with LARS
    accelerate launch scripts/pretrain_barlow_twins.py barlow_cifar10.yaml --seed 1
    accelerate launch scripts/pretrain_barlow_twins.py --dataset_name PATH_OR_HUB_NAME --output_dir out

Where hf_gr is installed, `hf-gr barlow` is the same command.

The model sees two random views of each image, and learns features that are the same for both and do not repeat each
other. Labels are used to evaluate alone: eval_knn_accuracy is the share of evaluation images whose class their nearest
training images tell. The folder backbone of the output folder is an image classifier with a new head, for
train_vit.py --model_name_or_path; evaluate_features.py compares its features with others.

A recipe (YAML or JSON) may come first; flags override it, along with whatever in it contradicts them. The default
recipe is barlow_digits.yaml. With --dataset_name or --model_name_or_path, or a recipe that does not set the method,
only its method (gr_*, ire_*, optim*) is used: the views are then those of the paper, for photographs.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers.image_processing_utils import BaseImageProcessor

from ..checks import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, check_fields, flag
from ..cli import script
from ..cli.barlow_twins import BarlowTwinsTrainer, Views
from ..cli.image_data import ImageArguments, Images, read_images
from ..cli.script import ScriptConfig
from ..cli.shipped import RECIPES
from ..data.augmentation import Augmentation
from ..data.embedded import EMBEDDED
from ..data.images import (
    check_first_example,
    preprocess,
)
from ..errors import extra
from ..models.barlow_twins import BarlowTwinsForPretraining
from ..models.presets import IMAGE_PRESETS
from . import train_vit

with extra("scripts"):
    pass

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = RECIPES / "barlow_digits.yaml"
DEFAULT_MODEL = "resnet-18"
BACKBONE = "backbone"


@dataclass
class ModelArguments(train_vit.ModelArguments):
    model: str | None = flag(None, f"Backbone to train from scratch. Default: {DEFAULT_MODEL}.", IMAGE_PRESETS)
    projector_sizes: list[int] = field(
        default_factory=lambda: [4096, 4096, 4096],
        metadata={"help": "Widths of the layers of the projector, which is not needed after training."},
    )
    off_diagonal_weight: float = flag(
        0.0051, "Weight of the part of the loss that decorrelates the outputs, lambda in the paper.", NOT_NEGATIVE
    )

    def __post_init__(self):
        if self.model is None and self.model_name_or_path is None:
            self.model = DEFAULT_MODEL
        super().__post_init__()
        check_fields(self, ModelArguments)
        if not self.projector_sizes or min(self.projector_sizes) < 2:
            raise ValueError(f"projector_sizes={self.projector_sizes}: give the width of each layer, 2 or more.")


@dataclass
class ViewArguments:
    """How the two views of an image are made. Of two numbers, the second is for the second view."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Range of the share of the image's area that a view shows."},
    )
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the views."})
    color_jitter: list[float] = field(
        default_factory=lambda: [0.4, 0.4, 0.2, 0.1],
        metadata={"help": "Strength of random changes of brightness, contrast, saturation and hue."},
    )
    color_jitter_probability: float = flag(0.8, "Share of the views whose colors change.", PROBABILITY)
    grayscale: float = flag(0.2, "Probability of removing the color.", PROBABILITY)
    blur: list[float] = field(
        default_factory=lambda: [1.0, 0.1],
        metadata={"help": "Probabilities of blurring the first and the second view."},
    )
    blur_sigma: list[float] = field(
        default_factory=lambda: [0.1, 2.0], metadata={"help": "Range of the standard deviation of the blur, in pixels."}
    )
    solarize: list[float] = field(
        default_factory=lambda: [0.0, 0.2],
        metadata={"help": "Probabilities of inverting bright pixels, in either view."},
    )

    def __post_init__(self):
        check_fields(self, ViewArguments)
        for name, length in (("crop_scale", 2), ("color_jitter", 4), ("blur", 2), ("blur_sigma", 2), ("solarize", 2)):
            values = getattr(self, name)
            if len(values) != length:
                raise ValueError(f"{name}={values}: give {length} numbers.")
        for name in ("blur", "solarize"):
            if not all(map(PROBABILITY.allows, getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)}: give probabilities from 0 to 1.")
        if self.blur == [0, 0] and self.blur_sigma != [0.1, 2.0]:
            raise ValueError(f"blur_sigma={self.blur_sigma} has no effect with blur={self.blur}. Leave it out.")
        self.views((0.0,), (1.0,))  # checks the rest

    def views(self, mean: Any, std: Any) -> Views:
        """The views of images with this normalization."""
        jitters = max(self.color_jitter) > 0
        common: dict[str, Any] = {
            "mean": mean,
            "std": std,
            "crop_scale": tuple(self.crop_scale),
            "flip": 0.5 if self.random_flip else 0.0,
            "color_jitter": tuple(self.color_jitter) if jitters else None,
            "color_jitter_probability": self.color_jitter_probability,
            "grayscale": self.grayscale,
            "blur_sigma": tuple(self.blur_sigma),
        }
        pairs = zip(self.blur, self.solarize, strict=True)
        return Views(*(Augmentation(**common, blur=blur, solarize=solarize) for blur, solarize in pairs))


@dataclass
class DataArguments(ViewArguments, ImageArguments):
    knn_k: int = flag(200, "Nearest neighbors that vote on the class of an evaluation image.", COUNT)
    knn_temperature: float = flag(0.1, "T of the weights exp(cosine similarity / T) of the votes.", POSITIVE)

    def __post_init__(self):
        ImageArguments.__post_init__(self)
        check_fields(self, DataArguments)
        super().__post_init__()


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, ScriptConfig]:
    kinds = (ModelArguments, DataArguments, ScriptConfig)
    return script.parse_args(kinds, argv, DEFAULT_RECIPE, without_it=("dataset_name", "model_name_or_path"))


def create_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: ScriptConfig, data: Images
) -> BarlowTwinsTrainer:
    backbone, image_processor = train_vit.create_model(model_args, data.label_names)
    normalization: Any = image_processor
    train, test = (
        preprocess(split, image_processor, data.image_column, data.label_column, name, data_args.image_max_value)
        for name, split in {"train": data.train, data.test_split: data.test}.items()
    )
    check_first_example(train, data.image_column, data_args.image_max_value)
    args.remove_unused_columns = False  # preprocessing reads the image column
    args.label_names = ["labels"]
    if data_args.knn_k > len(train):
        logger.warning(f"knn_k={data_args.knn_k}: there are only {len(train)} training images, and all of them vote.")
    return BarlowTwinsTrainer(
        model=BarlowTwinsForPretraining.of(
            backbone,
            projector_sizes=model_args.projector_sizes,
            off_diagonal_weight=model_args.off_diagonal_weight,
        ),
        args=args,
        views=data_args.views(normalization.image_mean, normalization.image_std),
        memory=train,
        classes=len(data.label_names),
        k=data_args.knn_k,
        temperature=data_args.knn_temperature,
        train_dataset=train,
        eval_dataset=test,
        processing_class=image_processor,
    )


def save_backbone(trainer: BarlowTwinsTrainer, label_names: list[str]) -> None:
    """Save the backbone as an image classifier with a new head, and its image processor, beside the whole model."""
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir)) / BACKBONE
        trainer.model.image_classifier(label_names).save_pretrained(folder)
        cast(BaseImageProcessor, trainer.processing_class).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_args(argv)
    with script.claim(args):
        with args.main_process_first(desc="loading the data"):
            data = read_images(data_args, args)
        trainer = create_trainer(model_args, data_args, args, data)
        in_words = (
            f"{data_args.dataset_name}, {len(data.train):,} training images without their labels; {len(data.test):,} "
            f"of {len(data.label_names)} classes to evaluate on"
        )
        script.begin(trainer, model_args, data_args, data=in_words)
        folder = Path(str(args.output_dir))
        metrics = script.train(trainer, data.counts, further={"views": lambda: trainer.draw(folder)})
        save_backbone(trainer, data.label_names)
        if trainer.is_world_process_zero():
            accuracy, examples = 100 * metrics["eval_knn_accuracy"], script.evaluated_examples(trainer)
            print(f"kNN accuracy {accuracy:.2f} % on {examples} images, with {trainer.k} neighbors.")
        script.publish(
            trainer,
            data_args.dataset_name,
            embedded={name: dataset.title for name, dataset in EMBEDDED.items()},
            tasks="image-feature-extraction",
            dataset_args=data.test_split,
            started=(__file__, argv),
        )


if __name__ == "__main__":
    script.run(main)
