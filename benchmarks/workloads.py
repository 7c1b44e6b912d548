"""The models and batches that are timed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_gr.models.presets import LLAMA_PRESETS, VIT_PRESETS, create_image_model, create_llama

NAMES = {"vit-ti": "ViT-Ti", "vit-b": "ViT-B", "resnet-18": "ResNet-18", "llama-60m": "Llama 60M"}
TINY = {"vit-ti": "vit-micro", "vit-b": "vit-micro", "resnet-18": "resnet-20", "llama-60m": "llama-tiny"}
CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """A model of hf_gr's presets, without dropout, and a batch: of images, or of texts of `length` tokens."""

    preset: str
    batch: int
    length: int = 0
    vocabulary: int = 50_304

    @property
    def name(self) -> str:
        size = f"{self.batch} x {self.length} tokens" if self.length else f"batch {self.batch}"
        return f"{self.model_name}, {size}"

    @property
    def model_name(self) -> str:
        return NAMES.get(self.preset, self.preset)

    def tiny(self, is_tiny: bool = True) -> "Workload":
        if not is_tiny:
            return self
        return replace(self, preset=TINY[self.preset], batch=2, length=min(self.length, 8), vocabulary=256)

    def model(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        if self.preset in LLAMA_PRESETS:
            return create_llama(self.preset, self.vocabulary, max(self.length, 1)).to(device)
        model = create_image_model(self.preset, [str(i) for i in range(CLASSES)], dropout=0.0, stem="cifar")
        if self.preset in VIT_PRESETS:
            nn.init.normal_(model.classifier.weight, std=0.02)  # it begins at 0, and with it every other gradient
        return model.to(device)

    def inputs(self, device: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        if self.length:
            ids = torch.randint(0, self.vocabulary, (self.batch, self.length), device=device)
            return {"input_ids": ids, "labels": ids}
        side = 8 if self.preset.endswith("micro") else 32
        return {
            "pixel_values": torch.randn(self.batch, 3, side, side, device=device),
            "labels": torch.randint(0, CLASSES, (self.batch,), device=device),
        }


def random_gradients(params: list[nn.Parameter]) -> list[Tensor]:
    torch.manual_seed(0)
    return [1e-2 * torch.randn_like(p) for p in params]


def fill(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Copies, since some of what is timed destroys them."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()


def size_of(tensors: list[nn.Parameter]) -> int:
    """N, the bytes of all parameters."""
    return sum(t.numel() * t.element_size() for t in tensors)
