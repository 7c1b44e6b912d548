"""A ResNet for small images. This file is saved beside the weights, so that they load without hf_gr."""

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class CifarResNetConfig(ResNetConfig):
    model_type = "cifar-resnet"


class CifarResNetForImageClassification(ResNetForImageClassification):
    """A ResNet whose stem keeps the resolution: a 3 x 3 convolution of stride 1, and no pooling.

    The ImageNet stem reduces a 32 x 32 image to 8 x 8 before the first block; this stem is that of the CIFAR models in
    "Deep Residual Learning for Image Recognition" (He et al., CVPR 2016, section 4.2).
    """

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        embeddings = self.resnet.embedder
        embeddings.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, activation=config.hidden_act
        )
        embeddings.pooler = nn.Identity()  # type: ignore[assignment]
        self.post_init()


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
