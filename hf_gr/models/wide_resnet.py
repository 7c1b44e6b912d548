"""Wide ResNets, which transformers lacks. This file is saved beside the weights, so that they load without hf_gr."""

import itertools

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput


class WideResNetConfig(PretrainedConfig):
    """The shape of a wide ResNet, WRN-d-k.

    Args:
        depth: d = 6 n + 4, with n blocks in each of three stages.
        widen_factor: k; the stages have 16 k, 32 k and 64 k channels.
        dropout: probability between the two convolutions of a block.
    """

    model_type = "wide-resnet"

    def __init__(self, depth: int = 28, widen_factor: int = 10, num_channels: int = 3, dropout: float = 0.0, **kwargs):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: must be 6 n + 4 with n of at least 1, as in 10, 16 or 28.")
        self.depth = depth
        self.widen_factor = widen_factor
        self.num_channels = num_channels
        self.dropout = dropout
        super().__init__(**kwargs)


class PreActivationBlock(nn.Module):
    """x + f(x), where f is twice BatchNorm, ReLU and a 3 x 3 convolution: (b, c, h, w) -> (b, c', h / s, w / s).

    Where the channels or the resolution change, the shortcut is a 1 x 1 convolution of what the first ReLU returns.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        residual = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNetPreTrainedModel(PreTrainedModel):
    config_class = WideResNetConfig
    base_model_prefix = "wide_resnet"
    main_input_name = "pixel_values"
    _no_split_modules = ["PreActivationBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        """Kaiming normal for the convolutions (fan out), as in the released code; no bias at the start."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)


class WideResNetModel(WideResNetPreTrainedModel):
    """The network below the classifier: images of (b, channels, h, w) to features of (b, 64 k, h / 4, w / 4), and their
    mean over the image, (b, 64 k)."""

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        widths = [16, *(16 * config.widen_factor * 2**stage for stage in range(3))]
        blocks = (config.depth - 4) // 6
        self.stem = nn.Conv2d(config.num_channels, widths[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(
                PreActivationBlock(inputs, outputs, 1 if stage == 0 else 2, config.dropout),
                *(PreActivationBlock(outputs, outputs, 1, config.dropout) for _ in range(blocks - 1)),
            )
            for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None) -> BaseModelOutputWithPooling | tuple:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        x = F.relu(self.norm(x))
        output = BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean(dim=(2, 3)))
        return output.to_tuple() if return_dict is False else output


class WideResNetForImageClassification(WideResNetPreTrainedModel):
    """The WRN-d-k of "Wide Residual Networks" (Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146, Table 1)."""

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        self.wide_resnet = WideResNetModel(config)
        self.classifier = nn.Linear(64 * config.widen_factor, config.num_labels or 0)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple:
        """Images of (b, channels, h, w), and labels of (b,) for a loss; logits of (b, num_labels)."""
        logits = self.classifier(self.wide_resnet(pixel_values).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(WideResNetConfig.model_type, WideResNetConfig, exist_ok=True)
AutoModel.register(WideResNetConfig, WideResNetModel, exist_ok=True)
AutoModelForImageClassification.register(WideResNetConfig, WideResNetForImageClassification, exist_ok=True)
WideResNetConfig.register_for_auto_class()
WideResNetModel.register_for_auto_class("AutoModel")
WideResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
