"""Barlow Twins: a model learns, without labels, to describe two views of an image alike, with features that do not
repeat each other.

"Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (Zbontar et al., ICML 2021, arXiv:2103.03230).

All statistics are those of the global batch: k processes with b images each train as one process with k b images does.
torch.nn.SyncBatchNorm refuses the CPU, so BatchNorm is synchronized here, on every device.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from . import presets  # noqa: F401  makes its own architectures known to AutoConfig and AutoModel

EPS = 1e-5

# ---- Statistics of the global batch ----


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each of them uses it, so each contributes to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


def is_shared() -> bool:
    """Whether other processes have a part of the batch."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum(x: Tensor) -> Tensor:
    return _Sum.apply(x) if is_shared() else x


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel of x, (n, d) or (n, d, h, w), over the global batch; and the number of
    values that they are of. The mean comes first: a mean of squares minus a squared mean would cancel in float32."""
    dims = [0, *range(2, x.dim())]
    mine = x.new_tensor([x.numel() / x.shape[1]])
    *_, count = total = _sum(torch.cat([x.sum(dims), mine]))
    mean = total[:-1] / count
    variance = _sum((x - _per_channel(mean, x)).square().sum(dims)) / count
    return mean, variance, count


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _in_full_precision(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


class _Synchronized(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the global batch; with one process, and in evaluation mode, torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_shared()):
            return super().forward(x)
        self._check_input_dim(x)
        full = _in_full_precision(x)
        mean, variance, count = _moments(full)
        if self.track_running_stats:
            self._track(mean, variance * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        result = (full - _per_channel(mean, full)) * _per_channel(scale, full)
        return (result + _per_channel(self.bias, full) if self.affine else result).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        for kept, new in ((self.running_mean, mean), (self.running_var, unbiased_variance)):
            assert kept is not None
            kept.lerp_(new.to(kept.dtype), momentum)


class SynchronizedBatchNorm1d(_Synchronized, nn.BatchNorm1d):
    pass


class SynchronizedBatchNorm2d(_Synchronized, nn.BatchNorm2d):
    pass


SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
}


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let all BatchNorm layers of `model` use the statistics of the global batch. Names, weights and hooks stay."""
    for module in model.modules():
        module.__class__ = SYNCHRONIZED.get(type(module), type(module))


# ---- The loss ----


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """C = z1' z2 / n of (d, d), over the global batch of n images, of z1 and z2 with zero mean and unit variance.

    Args:
        z1: (n, d), the outputs of the projector for one view of the images. Variances are biased, with eps = 1e-5.
        z2: (n, d), those for another view of the same images.
    """
    with torch.autocast(z1.device.type, enabled=False):
        (a, count), (b, _) = _standardized(z1), _standardized(z2)
        return _sum(a.T @ b) / count


def _standardized(z: Tensor) -> tuple[Tensor, Tensor]:
    z = _in_full_precision(z)
    mean, variance, count = _moments(z)
    return (z - mean) * (variance + EPS).rsqrt(), count


def barlow_twins_loss(z1: Tensor, z2: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2, with the cross-correlation C of `cross_correlation` (Zbontar et al.,
    2021, Eq. 1 and 2).

    If torch.distributed is initialized, C is that of the global batch, and every process returns the same loss. DDP
    then averages gradients to the one that a single process would have for the whole batch.

    Args:
        z1: (n, d), the outputs of the projector for one view of the images.
        z2: (n, d), those for another view of the same images.
        off_diagonal_weight: w; 0.0051 is the paper's.

    Raises:
        ValueError: the shapes differ or are not (n, d), or there is only one image.
    """
    if z1.shape != z2.shape or z1.dim() != 2:
        raise ValueError(f"z1 of {tuple(z1.shape)} and z2 of {tuple(z2.shape)}: give two of the same shape (n, d).")
    if len(z1) < 2 and not is_shared():
        raise ValueError("Barlow Twins correlates over a batch: one image is not enough. Raise the batch size.")
    c = cross_correlation(z1, z2)
    return (1 - c.diagonal()).square().sum() + off_diagonal_weight * c.square().fill_diagonal_(0).sum()


# ---- The model ----


class BarlowTwinsConfig(PretrainedConfig):
    """A backbone and its projector.

    Args:
        backbone_config: the configuration of an image classifier of transformers or of `hf_gr.models`, or its dict.
        projector_sizes: widths of the projector's layers.
        off_diagonal_weight: w of `barlow_twins_loss`.
    """

    model_type = "barlow-twins"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projector_sizes: Sequence[int] = (4096, 4096, 4096),
        off_diagonal_weight: float = 0.0051,
        **kwargs,
    ):
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.projector_sizes = list(projector_sizes)
        self.off_diagonal_weight = off_diagonal_weight
        super().__init__(**kwargs)


@dataclass
class BarlowTwinsOutput(ModelOutput):
    """The loss, if a second view was given; the features of the first view, (n, width of the backbone)."""

    loss: Tensor | None = None
    features: Tensor | None = None


def remove_head(classifier: PreTrainedModel) -> int:
    """Replace the last linear layer of an image classifier by the identity, so that its `logits` are its features.
    Returns their number.

    Raises:
        ValueError: there is no such layer.
    """
    names = [
        name
        for name, module in classifier.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] == "classifier"
    ]
    if not names:
        raise ValueError(
            f"{type(classifier).__name__} has no linear layer called classifier. Give an image classifier of "
            "transformers or of hf_gr.models as the backbone."
        )
    head = classifier.get_submodule(names[-1])
    classifier.set_submodule(names[-1], nn.Identity())
    assert isinstance(head, nn.Linear)
    return head.in_features


def projector(width: int, sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers without bias, each but the last followed by BatchNorm and ReLU: (n, width) -> (n, sizes[-1])."""
    layers: list[nn.Module] = []
    for size in sizes[:-1]:
        layers += [nn.Linear(width, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, sizes[-1], bias=False))


class BarlowTwinsForPretraining(PreTrainedModel):
    """A backbone that learns from two views of each image; see `barlow_twins_loss`.

    Batches of two views train it in any `Trainer`; in evaluation mode, or with one view, it gives the features of the
    backbone. Gradient accumulation averages the losses of its micro-batches: it does not make the batch of the
    cross-correlation larger, as more processes do.

    Args:
        config: its `backbone_config` describes the backbone if none is given.
        backbone: an image classifier, whose head is replaced by the projector; see `of`.
    """

    config_class = BarlowTwinsConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"

    def __init__(self, config: BarlowTwinsConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError("backbone_config=None: give the configuration of an image classifier.")
        if not config.projector_sizes or min(config.projector_sizes) < 1:
            raise ValueError(f"projector_sizes={config.projector_sizes}: give the width of each layer, at least one.")
        if backbone is None:
            backbone = AutoModelForImageClassification.from_config(config.backbone_config)
        self.backbone = backbone
        self.projector = projector(remove_head(backbone), config.projector_sizes)
        synchronize_batch_norm(self)
        self.post_init()

    @classmethod
    def of(cls, backbone: PreTrainedModel, **settings: Any) -> "BarlowTwinsForPretraining":
        """Barlow Twins around `backbone`, an image classifier with random or pretrained weights, which loses its head.

        Args:
            settings: `projector_sizes` and `off_diagonal_weight`, as in `BarlowTwinsConfig`.
        """
        return cls(BarlowTwinsConfig(backbone.config, **settings), backbone)

    def _init_weights(self, module: nn.Module) -> None:
        """Of the projector, as torch does; the backbone has its own way."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: Tensor, second_pixel_values: Tensor | None = None, return_dict: bool | None = None
    ) -> BarlowTwinsOutput | tuple:
        """One view of each image, (n, channels, height, width), and for a loss a second one of the same shape."""
        features = self.backbone(pixel_values).logits
        loss = None
        if second_pixel_values is not None:
            second_features = self.backbone(second_pixel_values).logits
            z1, z2 = self.projector(features), self.projector(second_features)
            loss = barlow_twins_loss(z1, z2, self.config.off_diagonal_weight)
        output = BarlowTwinsOutput(loss=loss, features=features)
        return output.to_tuple() if return_dict is False else output

    def image_classifier(self, label_names: Sequence[str] | None = None) -> PreTrainedModel:
        """An ordinary image classifier with a copy of the backbone's weights and a new head, to be fine-tuned.

        Args:
            label_names: its classes, in the order of their ids; by default those of `backbone_config`.
        """
        config = copy.deepcopy(self.config.backbone_config)
        if label_names is not None:
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: i for i, name in enumerate(label_names)}
        classifier = AutoModelForImageClassification.from_config(config)
        classifier.load_state_dict(self.backbone.state_dict(), strict=False)  # without a head
        return classifier


AutoConfig.register(BarlowTwinsConfig.model_type, BarlowTwinsConfig, exist_ok=True)
