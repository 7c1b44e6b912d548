"""Presets of models to train from scratch."""

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .cait import CaitConfig, CaitForImageClassification
from .cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from .wide_resnet import WideResNetConfig, WideResNetForImageClassification


class Preset(NamedTuple):
    """A named model: its description in `--help` and the docs, and the arguments of its configuration."""

    help: str
    shape: dict[str, Any]


def _vit(width: int, layers: int, heads: int, image_size: int = 32, patch_size: int = 4) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return dict(zip(names, (width, layers, heads, image_size, patch_size), strict=True))


def _swin(
    width: int, depths: list[int], heads: list[int], image_size: int = 32, patch_size: int = 2, window_size: int = 4
) -> dict[str, Any]:
    sizes = {"image_size": image_size, "patch_size": patch_size, "window_size": window_size}
    return {"embed_dim": width, "depths": depths, "num_heads": heads, **sizes}


def _resnet(width: int, depths: list[int], stem: str, layer_type: str = "basic") -> dict[str, Any]:
    """The number of channels doubles from stage to stage; a bottleneck returns four times as many as it computes on."""
    outputs = 4 * width if layer_type == "bottleneck" else width
    widths = [outputs * 2**stage for stage in range(len(depths))]
    return {
        "embedding_size": width, "hidden_sizes": widths, "depths": depths, "layer_type": layer_type, "stem": stem,
    }  # fmt: skip


def _wide_resnet(depth: int, widen_factor: int) -> dict[str, int]:
    return {"depth": depth, "widen_factor": widen_factor}


def _efficientnet(width: float, depth: float, image_size: int) -> dict[str, Any]:
    return {
        "width_coefficient": width, "depth_coefficient": depth, "hidden_dim": int(1280 * width),
        "image_size": image_size,
    }  # fmt: skip


MICRO = "for images of 8 pixels and a laptop"
# All but the micro ones are published models. The ViTs, Swins and CaiTs for 32 pixels are those of the GR paper.
VIT_PRESETS = {
    "vit-micro": Preset(MICRO, _vit(64, 4, 4, image_size=8, patch_size=2)),
    "vit-ti": Preset("5.4 M parameters, for 32 pixels", _vit(192, 12, 3)),
    "vit-s": Preset("21 M", _vit(384, 12, 6)),
    "vit-b": Preset("85 M", _vit(768, 12, 12)),
    "vit-s-224": Preset("22 M, ViT-S/16 for ImageNet's 224 pixels", _vit(384, 12, 6, 224, 16)),
}
SWIN_PRESETS = {
    "swin-micro": Preset(MICRO, _swin(32, [2, 2], [2, 4], image_size=8, patch_size=1)),
    "swin-tiny": Preset("28 M, for 32 pixels", _swin(96, [2, 2, 6, 2], [3, 6, 12, 24])),
    "swin-small": Preset("49 M", _swin(96, [2, 2, 18, 2], [3, 6, 12, 24])),
    "swin-base": Preset("87 M", _swin(128, [2, 2, 18, 2], [4, 8, 16, 32])),
    "swin-tiny-224": Preset("28 M, for ImageNet's 224 pixels", _swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 224, 4, 7)),
}
CAIT_PRESETS = {
    "cait-micro": Preset(MICRO, _vit(64, 4, 4, image_size=8, patch_size=2)),
    "cait-xxs12": Preset("6.3 M, for 32 pixels", _vit(192, 12, 4)),
    "cait-xxs24": Preset("12 M", _vit(192, 24, 4)),
    "cait-xs12": Preset("14 M", _vit(288, 12, 6)),
    "cait-s12": Preset("25 M", _vit(384, 12, 8)),
}
#: Those of three stages are for CIFAR-10 (He et al., CVPR 2016, section 4.2); a shortcut to more channels is a
#: projection in them, too, where the paper pads with zeros: 2,752 parameters more. ResNet-50 is that of torchvision,
#: with the stride in the 3 x 3 convolution.
RESNET_PRESETS = {
    "resnet-18": Preset("11 M, for any image size", _resnet(64, [2, 2, 2, 2], "imagenet")),
    "resnet-34": Preset("21 M", _resnet(64, [3, 4, 6, 3], "imagenet")),
    "resnet-50": Preset("26 M, of bottlenecks", _resnet(64, [3, 4, 6, 3], "imagenet", "bottleneck")),
    "resnet-20": Preset("0.27 M, for 32 pixels", _resnet(16, [3, 3, 3], "cifar")),
    "resnet-32": Preset("0.46 M", _resnet(16, [5, 5, 5], "cifar")),
    "resnet-56": Preset("0.86 M", _resnet(16, [9, 9, 9], "cifar")),
}
RESNET_STEMS = ("imagenet", "cifar")
WIDE_RESNET_PRESETS = {
    "wrn-10-1": Preset("for small images and a laptop", _wide_resnet(10, 1)),
    "wrn-16-8": Preset("11 M parameters, for 32 pixels", _wide_resnet(16, 8)),
    "wrn-28-10": Preset("36 M", _wide_resnet(28, 10)),
}
EFFICIENTNET_PRESETS = {
    "efficientnet-micro": Preset("for images of 32 pixels and a laptop", _efficientnet(0.25, 0.5, 32)),
    "efficientnet-b0": Preset("5.3 M parameters, for 224 pixels", _efficientnet(1.0, 1.0, 224)),
}

#: All image classifiers; a `ChainMap` iterates from its last map to its first.
IMAGE_PRESETS = ChainMap(
    EFFICIENTNET_PRESETS, WIDE_RESNET_PRESETS, RESNET_PRESETS, CAIT_PRESETS, SWIN_PRESETS, VIT_PRESETS
)

WEIGHT_INITS: dict[str, Callable] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
}


def create_image_model(
    preset: str,
    label_names: list[str],
    image_size: int | None = None,
    dropout: float | None = None,
    stem: str | None = None,
) -> PreTrainedModel:
    """A freshly initialized image classifier.

    Args:
        preset: one of `IMAGE_PRESETS`.
        label_names: the classes, in the order of their ids.
        image_size: pixels per side if not the preset's; ignored by ResNets and wide ResNets, which take any.
        dropout: probability if not that of the released code; ignored by ResNets. See the functions below.
        stem: for ResNets, one of `RESNET_STEMS` if not the preset's.
    """
    if preset in RESNET_PRESETS:
        return create_resnet(preset, label_names, stem)
    options = {} if dropout is None else {"dropout": dropout}
    if preset in WIDE_RESNET_PRESETS:
        return create_wide_resnet(preset, label_names, **options)
    for presets, create in (
        (VIT_PRESETS, create_vit),
        (SWIN_PRESETS, create_swin),
        (CAIT_PRESETS, create_cait),
        (EFFICIENTNET_PRESETS, create_efficientnet),
    ):
        if preset in presets:
            return create(preset, label_names, image_size, **options)
    raise ValueError(f"model={preset!r}: choose one of {', '.join(IMAGE_PRESETS)}.")


def _labels(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _shape(presets: Mapping[str, Preset], preset: str) -> dict[str, Any]:
    """The preset's configuration arguments."""
    if preset not in presets:
        raise ValueError(f"model={preset!r}: choose one of {', '.join(presets)}.")
    return dict(presets[preset].shape)


def _shape_in_patches(presets: Mapping[str, Preset], preset: str, image_size: int | None) -> dict[str, Any]:
    """The same for images of `image_size`."""
    shape = _shape(presets, preset)
    if image_size is not None:
        shape["image_size"] = image_size
    if shape["image_size"] < 1 or shape["image_size"] % shape["patch_size"]:
        raise ValueError(
            f"image_size={image_size}: {preset} cuts images into patches of {shape['patch_size']} pixels; choose a "
            "multiple of that."
        )
    return shape


def create_vit(
    preset: str, label_names: list[str], image_size: int | None = None, dropout: float = 0.1
) -> ViTForImageClassification:
    """A freshly initialized ViT: MLP of 4 x width, class token, learned positions.

    Dropout (also on the attention weights) and initialization follow the code released with the paper: Xavier uniform
    for every matrix, zeros for the head and the class token, N(0, 0.02^2) for the positions. (transformers draws the
    matrices from N(0, 0.02^2), from which a narrow model learns nothing for many epochs.)

    Args:
        preset: a key of `VIT_PRESETS`.
        label_names: the classes, in the order of their ids.
        image_size: pixels per side if not the preset's; a multiple of the patch size.
        dropout: probability for hidden states and attention weights.
    """
    shape = _shape_in_patches(VIT_PRESETS, preset, image_size)
    config = ViTConfig(
        **shape,
        intermediate_size=4 * shape["hidden_size"],
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **_labels(label_names),
    )
    model = ViTForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(cast(nn.Linear, model.classifier).weight)
    nn.init.zeros_(cast(Tensor, model.vit.embeddings.cls_token))
    return model


def create_swin(
    preset: str, label_names: list[str], image_size: int | None = None, dropout: float = 0.1
) -> SwinForImageClassification:
    """A freshly initialized Swin, with the initialization of transformers and without stochastic depth.

    The code released with GR shrinks the window to 2 in the last stage, where 2 x 2 patches are left; here it keeps its
    size and is padded, which adds 1,920 (Base: 2,560) position biases.

    Args:
        preset: a key of `SWIN_PRESETS`.
        dropout: probability for the attention weights alone, as in the released code.
    """
    shape = _shape_in_patches(SWIN_PRESETS, preset, image_size)
    config = SwinConfig(**shape, attention_probs_dropout_prob=dropout, drop_path_rate=0.0, **_labels(label_names))
    return SwinForImageClassification(config)


def create_cait(
    preset: str, label_names: list[str], image_size: int | None = None, dropout: float = 0.0
) -> CaitForImageClassification:
    """A freshly initialized CaiT; see `hf_gr.models.cait`.

    Args:
        preset: a key of `CAIT_PRESETS`.
        dropout: probability for hidden states and attention weights.
    """
    shape = _shape_in_patches(CAIT_PRESETS, preset, image_size)
    return CaitForImageClassification(CaitConfig(**shape, dropout=dropout, **_labels(label_names)))


def create_resnet(preset: str, label_names: list[str], stem: str | None = None) -> ResNetForImageClassification:
    """A freshly initialized ResNet, with the initialization of transformers: Kaiming normal for the convolutions.

    Args:
        preset: a key of `RESNET_PRESETS`.
        label_names: the classes, in the order of their ids.
        stem: `imagenet`, a 7 x 7 convolution and pooling, which divide the resolution by 4 (used on CIFAR-10 by the
            code released with TVLARS); or `cifar`, for small images, a 3 x 3 convolution at full resolution. Default:
            the preset's.
    """
    shape = _shape(RESNET_PRESETS, preset)
    usual_stem = shape.pop("stem")
    stem = usual_stem if stem is None else stem
    if stem not in RESNET_STEMS:
        raise ValueError(f"stem={stem!r}: choose one of {', '.join(RESNET_STEMS)}.")
    classes: dict[str, tuple[Any, Any]] = {
        "imagenet": (ResNetConfig, ResNetForImageClassification),
        "cifar": (CifarResNetConfig, CifarResNetForImageClassification),
    }
    config_class, model_class = classes[stem]
    return model_class(config_class(**shape, **_labels(label_names)))


def create_wide_resnet(preset: str, label_names: list[str], dropout: float = 0.0) -> WideResNetForImageClassification:
    """A freshly initialized wide ResNet; see `hf_gr.models.wide_resnet`.

    Args:
        preset: a key of `WIDE_RESNET_PRESETS`.
        label_names: the classes, in the order of their ids.
        dropout: probability between the two convolutions of a block; the paper has 0 and 0.3.
    """
    shape = _shape(WIDE_RESNET_PRESETS, preset)
    return WideResNetForImageClassification(WideResNetConfig(**shape, dropout=dropout, **_labels(label_names)))


def create_efficientnet(
    preset: str, label_names: list[str], image_size: int | None = None, dropout: float = 0.2
) -> EfficientNetForImageClassification:
    """A freshly initialized EfficientNet, with the initialization and BatchNorm of torchvision.

    The configuration and initialization of transformers are for loading weights that were trained elsewhere: scales of
    BatchNorm are drawn from N(0, 0.02^2), and its running statistics are nearly those of the last batch.

    Args:
        preset: a key of `EFFICIENTNET_PRESETS`.
        label_names: the classes, in the order of their ids.
        image_size: pixels per side if not the preset's; at least 32.
        dropout: probability before the classifier. Elements of the residual branches are dropped with up to 0.2.
    """
    shape = _shape(EFFICIENTNET_PRESETS, preset)
    if image_size is not None:
        shape["image_size"] = image_size
    if shape["image_size"] < 32:
        raise ValueError(
            f"image_size={image_size}: {preset} halves the resolution five times; give at least 32 pixels."
        )
    config = EfficientNetConfig(
        **shape, dropout_rate=dropout, batch_norm_eps=1e-5, batch_norm_momentum=0.1, **_labels(label_names)
    )
    model = EfficientNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(max(1, module.out_features))
            nn.init.uniform_(module.weight, -bound, bound)
    return model


def initialize_weights(model: PreTrainedModel, scheme: str) -> None:
    """Redraw the weights of all linear and convolutional layers; biases, norms and embeddings are unchanged.

    Args:
        scheme: a key of `WEIGHT_INITS`.
    """
    if scheme not in WEIGHT_INITS:
        raise ValueError(f"weight_init={scheme!r}: choose one of {', '.join(WEIGHT_INITS)}.")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            WEIGHT_INITS[scheme](module.weight)


@dataclass(frozen=True)
class LlamaPreset:
    """The shape of a Llama, and the context length it was trained with."""

    help: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    context: int
    tie_word_embeddings: bool = False


#: Two for a laptop, and the Llamas of the IRE paper as transformers builds them: strictly causal, unlike two of the
#: three released models. Parameters are counted with the paper's vocabulary of 50,304.
LLAMA_PRESETS: dict[str, LlamaPreset] = {
    "llama-tiny": LlamaPreset("for a laptop", 4, 192, 6, 512, 256, tie_word_embeddings=True),
    "llama-mini": LlamaPreset("for a laptop, larger", 6, 256, 4, 688, 256, tie_word_embeddings=True),
    # The paper's width of 410 with 10 heads gives 41 dimensions per head; rotary embeddings need an even number.
    "llama-60m": LlamaPreset("65 M parameters", 16, 416, 8, 1664, 150, tie_word_embeddings=True),
    "llama-119m": LlamaPreset("134 M", 6, 768, 12, 3072, 512),
    "llama-229m": LlamaPreset("228 M", 16, 768, 12, 3072, 1024),
}


def create_llama(
    preset: str, vocab_size: int, context: int | None = None, eos_token_id: int | None = None
) -> LlamaForCausalLM:
    """A freshly initialized Llama, without dropout.

    Args:
        preset: a key of `LLAMA_PRESETS`.
        vocab_size: number of token ids; the embeddings are padded to a multiple of 64.
        context: positions, if not the preset's.
        eos_token_id: the end-of-text token, at which generation stops.
    """
    if preset not in LLAMA_PRESETS:
        raise ValueError(f"model={preset!r}: choose one of {', '.join(LLAMA_PRESETS)}.")
    if context is not None and context < 1:
        raise ValueError(f"context={context}: give at least one position, or leave it out for the preset's.")
    shape = LLAMA_PRESETS[preset]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-vocab_size // 64) * 64,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_attention_heads,
            max_position_embeddings=shape.context if context is None else context,
            tie_word_embeddings=shape.tie_word_embeddings,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=None,
        )
    )
