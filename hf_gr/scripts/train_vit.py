"""Train a ViT or a convolutional network for image classification, with gradient regularization.

    accelerate launch scripts/train_vit.py                                      # a small ViT on scans of digits
    accelerate launch scripts/train_vit.py --gr_lambda 0                        # the same without GR
    accelerate launch scripts/train_vit.py vit_ti_cifar10.yaml --seed 1
    accelerate launch scripts/train_vit.py --dataset_name PATH_OR_HUB_NAME --model vit-s --output_dir out

Where hf_gr is installed, `hf-gr vit` is the same command.

A recipe (YAML or JSON) may come first; flags override it, along with whatever in it contradicts them. The default
recipe is vit_digits.yaml. With --dataset_name or --model_name_or_path, or a recipe that does not set the method, only
its method (gr_*, ire_*, optim*) is used: the data never changes the method.
"""

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor

from .. import GRTrainer
from ..checks import COUNT, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, PROBABILITY, SHARE, Limit, check_ranges, flag
from ..cli import script
from ..cli.image_data import ImageArguments, Images, read_images
from ..cli.script import ScriptConfig
from ..cli.shipped import RECIPES
from ..cli.trainers import BatchNormReestimation, ImageTrainer
from ..data.augmentation import Augmentation, Mixing
from ..data.embedded import EMBEDDED
from ..data.images import (
    IS_WRONG,
    LABEL_NOISES,
    check_first_example,
    normalization_of,
    part_to_train_on,
    preprocess,
    with_size,
)
from ..errors import explained, extra
from ..evaluation import classification_metrics, rank_classes
from ..models.presets import (
    IMAGE_PRESETS,
    RESNET_PRESETS,
    RESNET_STEMS,
    WEIGHT_INITS,
    create_image_model,
    initialize_weights,
)

with extra("scripts"):
    from datasets import Dataset

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = RECIPES / "vit_digits.yaml"


@dataclass
class ModelArguments(script.ModelArguments):
    model: str | None = flag(None, "Architecture to train from scratch. Default: vit-ti.", IMAGE_PRESETS)
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained checkpoint to start from, on the Hub or in a folder."}
    )
    # A checkpoint has its own values of these; they describe a model trained from scratch.
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout, also of attention weights (Swin: only those). Default: 0.1; 0 for CaiT and wide "
            "ResNets, 0.2 for EfficientNets."
        },
    )
    stem: str | None = field(
        default=None,
        metadata={
            "help": "First layers of a ResNet. imagenet divides the resolution by 4, cifar keeps it. Default: cifar "
            "for resnet-20, resnet-32 and resnet-56, imagenet for the others.",
            "choices": list(RESNET_STEMS),
        },
    )
    weight_init: str | None = field(
        default=None,
        metadata={
            "help": "Initialization of linear and convolutional weights. Default: the architecture's.",
            "choices": list(WEIGHT_INITS),
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels per side. Default: the architecture's; 32 for ResNets, wide or not."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Subtracted from each channel, scaled to [0, 1]. Default: 0.5 0.5 0.5."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Then divided by. Default: 0.5 0.5 0.5."})
    crop_pct: float | None = flag(
        None,
        "Resize the shortest side to image_size / crop_pct, and crop the center. 0.875 is common for ImageNet. "
        "Default: resize both sides to image_size.",
    )

    def __post_init__(self):
        self._check_ranges()
        if self.model_name_or_path is not None:
            names = ("model", "dropout", "stem", "weight_init", "image_size", "image_mean", "image_std", "crop_pct")
            script.refuse(self, names, f"model_name_or_path={self.model_name_or_path!r}, which brings its own")
        elif self.model in RESNET_PRESETS:
            script.refuse(self, ("dropout",), f"model={self.model!r}, which has none")
        else:
            script.refuse(self, ("stem",), f"model={self.model or 'vit-ti'!r}, whose first layers are fixed")

    def _check_ranges(self) -> None:
        check_ranges(self, {"image_size": COUNT, "dropout": SHARE, "crop_pct": POSITIVE_SHARE})
        for name, limit, more in (("image_mean", Limit(-math.inf), ""), ("image_std", POSITIVE, " above 0")):
            values = getattr(self, name)
            if values is not None and not (len(values) == 3 and all(map(limit.allows, values))):
                raise ValueError(f"{name}={values}: give three numbers{more}, one per color, or leave it out.")


@dataclass
class DataArguments(ImageArguments):
    label_noise: float = flag(
        0.0, "Give this share of the training examples a wrong label, drawn with --seed. Does the model memorize them?"
    )
    label_noise_type: str | None = flag(None, "Which label is the wrong one. Default: symmetric.", LABEL_NOISES)
    validation_fraction: float | None = flag(
        None,
        "Hold this share of the training examples out, to choose settings by. They keep their wrong labels. Evaluation "
        "during training (eval_*) is on them, and the test set is evaluated once, at the end (test_*).",
    )
    random_flip: bool = field(default=True, metadata={"help": "Mirror training images at random."})
    crop_padding: int | None = flag(
        None,
        "Shift training images by up to this many pixels, reflecting the border. Default: 4; 0 with "
        "random_resized_crop.",
    )
    random_resized_crop: float | None = flag(
        None,
        "Crop a random part of training images, of at least this share of the area. It is resized to the size that "
        "the model takes. 0.08 is common for ImageNet. Default: off.",
    )
    crop_source_size: int | None = flag(
        None,
        "Size of the images that random_resized_crop crops. They are made like those for evaluation. Default: "
        "image_size.",
    )
    rand_augment: list[int] | None = field(
        default=None,
        metadata={
            "help": "Number and magnitude of RandAugment's operations on training images, such as 2 15. The magnitude "
            "is at most 30. Default: off."
        },
    )
    color_jitter: list[float] | None = field(
        default=None,
        metadata={
            "help": "Largest changes of brightness, contrast, saturation and hue, such as 0.4 0.4 0.4 0.1. Those of "
            "each training image are drawn. Default: off."
        },
    )
    grayscale: float = flag(0.0, "Share of the training images that lose their color.")
    blur: float = flag(0.0, "Share of the training images that are blurred, with sigma from 0.1 to 2.")
    solarize: float = flag(0.0, "Share of the training images whose bright half is inverted.")
    mixup: float = flag(
        0.0,
        "MixUp: alpha of the weight's distribution, Beta(alpha, alpha); 0: off. Beside cutmix, each batch gets one of "
        "them. Memorization of wrong labels is not logged then: a mixed image has no single label.",
    )
    cutmix: float = flag(0.0, "CutMix: the same.")
    reestimate_batch_norm: int | None = field(
        default=None,
        metadata={
            "help": "After training, recompute BatchNorm's running statistics from this many images. They are training "
            "images without augmentation. After few steps the statistics still reflect earlier weights."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        limits = {
            "label_noise": SHARE,
            "crop_padding": NOT_NEGATIVE,
            "random_resized_crop": POSITIVE_SHARE,
            "validation_fraction": Limit(0, 1, True, True),
        }
        limits |= dict.fromkeys(("reestimate_batch_norm", "crop_source_size"), COUNT)
        limits |= dict.fromkeys(("grayscale", "blur", "solarize"), PROBABILITY)
        check_ranges(self, limits | dict.fromkeys(("mixup", "cutmix"), NOT_NEGATIVE))
        if self.label_noise == 0:
            script.refuse(self, ("label_noise_type",), "label_noise=0")
        if self.random_resized_crop is None:
            script.refuse(self, ("crop_source_size",), "random_resized_crop=None")
        self.augmentation()

    def augmentation(
        self, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,), size: tuple[int, int] | None = None
    ) -> Augmentation:
        """What the flags turn on, for images of `size`. Raises `ValueError` if one of them is out of range."""
        crop_scale = None if self.random_resized_crop is None else (self.random_resized_crop, 1.0)
        padding = (4 if crop_scale is None else 0) if self.crop_padding is None else self.crop_padding
        if size is not None and padding >= min(size):
            raise ValueError(
                f"crop_padding={padding}: too much to pad an image of {size[0]} x {size[1]} pixels by reflection. Give "
                f"at most {min(size) - 1}, or 0 (off)."
            )
        return Augmentation(
            mean,
            std,
            None if crop_scale is None else size,
            crop_scale,
            flip=0.5 if self.random_flip else 0.0,
            crop_padding=padding,
            rand_augment=self.rand_augment,
            color_jitter=self.color_jitter,
            grayscale=self.grayscale,
            blur=self.blur,
            solarize=self.solarize,
        )

    def mixing(self) -> Mixing | None:
        """MixUp and CutMix, if one of them is on."""
        return Mixing(self.mixup, self.cutmix) if self.mixup or self.cutmix else None


def parse_args(argv: list[str]) -> tuple[ModelArguments, DataArguments, ScriptConfig]:
    kinds = (ModelArguments, DataArguments, ScriptConfig)
    return script.parse_args(kinds, argv, DEFAULT_RECIPE, without_it=("dataset_name", "model_name_or_path"))


def _load_model(name: str, label_names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    remedy = "Give a folder that a model and its image processor were saved to, or a name on the Hub."
    with explained(f"model_name_or_path={name!r} could not be loaded", remedy):
        model = AutoModelForImageClassification.from_pretrained(
            name,
            id2label=dict(enumerate(label_names)),
            label2id={name: i for i, name in enumerate(label_names)},
            ignore_mismatched_sizes=True,  # the head, if the number of classes differs
        )
        return model, AutoImageProcessor.from_pretrained(name)


def create_model(args: ModelArguments, label_names: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and the image processor that belongs to it."""
    if args.model_name_or_path is not None:
        return _load_model(args.model_name_or_path, label_names)
    model = create_image_model(args.model or "vit-ti", label_names, args.image_size, args.dropout, args.stem)
    image_size = getattr(model.config, "image_size", 32) if args.image_size is None else args.image_size
    if args.weight_init is not None:
        initialize_weights(model, args.weight_init)
    square = {"height": image_size, "width": image_size}
    is_cropped = args.crop_pct is not None
    image_processor = ViTImageProcessorPil(
        size=square if args.crop_pct is None else {"shortest_edge": int(image_size / args.crop_pct)},
        do_center_crop=is_cropped or None,
        crop_size=square if is_cropped else None,
        image_mean=[0.5] * 3 if args.image_mean is None else args.image_mean,
        image_std=[0.5] * 3 if args.image_std is None else args.image_std,
    )
    return model, image_processor


def load_data(args: DataArguments, training: ScriptConfig) -> Images:
    data = read_images(args, training)
    train, validation = part_to_train_on(
        data.train, data.label_column, training.seed, args.label_noise, args.label_noise_type, args.validation_fraction
    )
    counts = data.counts
    if args.label_noise > 0:
        counts = counts | {"train_wrong_labels": sum(train[IS_WRONG])}
        if validation is not None:
            validation = validation.remove_columns(IS_WRONG)  # only what was trained on can be memorized
    return data._replace(train=train, validation=validation, counts=counts)


def create_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: ScriptConfig, data: Images
) -> tuple[GRTrainer, Dataset | None]:
    """The trainer, and the test set if it evaluates on a validation part instead."""
    model, image_processor = create_model(model_args, data.label_names)
    column, max_value = data.image_column, data_args.image_max_value

    def inputs(images: Dataset, split: str, processor: BaseImageProcessor = image_processor) -> Dataset:
        return preprocess(images, processor, column, data.label_column, split, max_value)

    source_size = data_args.crop_source_size
    source = image_processor if source_size is None else with_size(image_processor, source_size)
    train, test = inputs(data.train, "train", source), inputs(data.test, data.test_split)
    validation = None if data.validation is None else inputs(data.validation, "validation part of train")
    check_first_example(train, column, max_value)
    height, width = test[0]["pixel_values"].shape[-2:]
    augmentation = data_args.augmentation(*normalization_of(image_processor), (height, width))
    args.remove_unused_columns = False  # preprocessing reads the image column
    args.label_names = ["labels"]
    callbacks = []
    if (count := data_args.reestimate_batch_norm) is not None:
        some = data.train.select(range(min(count, len(data.train))))
        callbacks.append(BatchNormReestimation(inputs(some, "train")))
    mixing = data_args.mixing()
    if mixing is not None and data_args.label_noise > 0:
        logger.warning(f"label_noise={data_args.label_noise}: memorization is not logged with mixup or cutmix.")
    trainer = ImageTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test if validation is None else validation,
        processing_class=image_processor,
        compute_metrics=classification_metrics,
        preprocess_logits_for_metrics=rank_classes,
        callbacks=callbacks,
        augmentation=augmentation,
        mixing=mixing,
    )
    return trainer, None if validation is None else test


def in_words(name: str, data: Images) -> str:
    wrong = f", {data.counts['train_wrong_labels']:,} wrong labels" if "train_wrong_labels" in data.counts else ""
    held_out = "" if data.validation is None else f"{len(data.validation):,} to choose settings by, "
    return (
        f"{name}, {len(data.train):,} training images of {len(data.label_names)} classes{wrong}; {held_out}"
        f"{len(data.test):,} to test on"
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_args(argv)
    with script.claim(args):
        with args.main_process_first(desc="loading the data"):
            data = load_data(data_args, args)
        trainer, test = create_trainer(model_args, data_args, args, data)
        script.begin(trainer, model_args, data_args, data=in_words(data_args.dataset_name, data))
        metrics = script.train(trainer, data.counts, test=test)
        error = "eval_error" if test is None else "test_error"
        if trainer.is_world_process_zero() and error in metrics:
            print(f"Test error {100 * metrics[error]:.2f} % on {script.evaluated_examples(trainer)} images.")
        script.publish(
            trainer,
            data_args.dataset_name,
            embedded={name: dataset.title for name, dataset in EMBEDDED.items()},
            tasks="image-classification",
            dataset_args=data.test_split,
            started=(__file__, argv),
        )


if __name__ == "__main__":
    script.run(main)
