"""CaiT, which transformers lacks. This file is saved beside the weights, so that they load without hf_gr."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput


class CaitConfig(PretrainedConfig):
    """The shape of a CaiT: `num_hidden_layers` for the patches, then `num_class_layers` for the class token."""

    model_type = "cait"

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        num_channels: int = 3,
        hidden_size: int = 192,
        num_hidden_layers: int = 12,
        num_class_layers: int = 2,
        num_attention_heads: int = 4,
        mlp_ratio: int = 4,
        layer_scale: float = 1e-5,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        **kwargs,
    ):
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_class_layers = num_class_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.layer_scale = layer_scale
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)


class TalkingHeadsAttention(nn.Module):
    """Self-attention whose heads are mixed by a linear map before the softmax, and by another after it.

    (b, n, d) -> (b, n, d).
    """

    def __init__(self, config: CaitConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.mix_scores = nn.Linear(self.heads, self.heads)
        self.mix_weights = nn.Linear(self.heads, self.heads)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
        weights = self._mix(scores, self.mix_scores).softmax(dim=-1)
        weights = self.dropout(self._mix(weights, self.mix_weights))
        return self.dropout(self.out((weights @ v).transpose(1, 2).reshape(b, n, d)))

    @staticmethod
    def _mix(x: Tensor, layer: nn.Linear) -> Tensor:
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ClassAttention(nn.Module):
    """Attention of the first token to all tokens, including itself: (b, n, d) -> (b, 1, d)."""

    def __init__(self, config: CaitConfig):
        super().__init__()
        self.heads, self.attention_dropout = config.num_attention_heads, config.dropout
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, config.hidden_size)
        self.v = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, _, d = x.shape
        q, k, v = (
            layer(part).view(b, -1, self.heads, d // self.heads).transpose(1, 2)
            for layer, part in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        read = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(read.transpose(1, 2).reshape(b, 1, d)))


class CaitBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel by a gamma that starts small (LayerScale)."""

    def __init__(self, config: CaitConfig, attention: nn.Module):
        super().__init__()
        width, inner = config.hidden_size, config.mlp_ratio * config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = attention
        self.gamma1 = nn.Parameter(torch.empty(width))
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(inner, width),
            nn.Dropout(config.dropout),
        )  # fmt: skip
        self.gamma2 = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x of (b, n, d); attention also reads from `context`, which is appended to x and not updated."""
        tokens = x if context is None else torch.cat([x, context], dim=1)
        x = x + self.gamma1 * self.attention(self.norm1(tokens))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class CaitForImageClassification(PreTrainedModel):
    """CaiT of "Going deeper with Image Transformers" (Touvron et al., ICCV 2021, arXiv:2103.17239).

    Patches attend to each other with talking heads, and only then does a class token read them; LayerScale (Eq. 4)
    scales every block. Learned positions, no distillation and no stochastic depth, as in the code released with GR.
    """

    config_class = CaitConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["CaitBlock"]

    def __init__(self, config: CaitConfig):
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (config.image_size // patch) ** 2, width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            CaitBlock(config, TalkingHeadsAttention(config)) for _ in range(config.num_hidden_layers)
        )
        self.class_layers = nn.ModuleList(
            CaitBlock(config, ClassAttention(config)) for _ in range(config.num_class_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(width, config.num_labels or 0)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CaitBlock):
            init.constant_(module.gamma1, self.config.layer_scale)
            init.constant_(module.gamma2, self.config.layer_scale)
        elif isinstance(module, CaitForImageClassification):
            init.normal_(module.positions, std=self.config.initializer_range)
            init.normal_(module.cls_token, std=self.config.initializer_range)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple:
        """Images of (b, channels, side, side), and labels of (b,) for a loss; logits of (b, num_labels)."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = self.dropout(x + self.positions)
        for layer in self.layers:
            x = layer(x)
        cls = self.cls_token.expand(len(x), -1, -1)
        for layer in self.class_layers:
            cls = layer(cls, context=x)
        logits = self.classifier(self.norm(cls[:, 0]))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


AutoConfig.register(CaitConfig.model_type, CaitConfig, exist_ok=True)
AutoModelForImageClassification.register(CaitConfig, CaitForImageClassification, exist_ok=True)
CaitConfig.register_for_auto_class()
CaitForImageClassification.register_for_auto_class("AutoModelForImageClassification")
