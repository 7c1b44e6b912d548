"""Pipelines of augmentation in hf_gr, kornia and torchvision, and what these do differently. `costs.py` times them.

    pip install --target PEERS kornia
    python benchmarks/augmentation.py --peers PEERS

All get images that are already decoded and return a normalized batch. hf_gr and kornia get a batch of floats;
torchvision gets one image after the other, as in a data loader, as tensors of 8 bits or as Pillow's.
"""

import argparse
import functools
import statistics
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import peers
import torch
from PIL import Image
from timing import Run
from torch import Tensor
from torch.nn import functional as F

from hf_gr import __version__
from hf_gr.data.augmentation import Augmentation, barlow_twins_views, resized_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, JITTER, SIGMA = (0.08, 1.0), (0.4, 0.4, 0.2, 0.1), (0.1, 2.0)
KINDS = ("crop and flip", "RandAugment(2, 15)", "color jitter", "blur, half of the images", "a view of Barlow Twins")


def ours(images: Tensor) -> dict[str, Run]:
    options = (
        {"crop_scale": SCALE, "flip": 0.5},
        {"rand_augment": (2, 15)},
        {"color_jitter": JITTER},
        {"blur": 0.5, "blur_sigma": SIGMA},
    )
    augmentations = [*(Augmentation(MEAN, STD, **each) for each in options), barlow_twins_views(None, MEAN, STD)[0]]
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (MEAN, STD))
    batch = (images / 255 - mean) / std
    return {kind: partial(augment, batch) for kind, augment in zip(KINDS, augmentations, strict=True)}


def kornias(images: Tensor) -> dict[str, Run]:
    K = peers.peer("kornia.augmentation")
    RandAugment = peers.peer("kornia.augmentation.auto").RandAugment
    side = images.shape[-1]
    kernel = 23 if side > 64 else 3  # a tenth of the image, as in BYOL
    crop = [K.RandomResizedCrop((side, side), scale=SCALE, resample="bicubic"), K.RandomHorizontalFlip()]
    view = [*crop, K.ColorJitter(*JITTER, p=0.8), K.RandomGrayscale(p=0.2), _kornia_blur(K, kernel, 1.0)]
    kinds = (crop, [RandAugment(2, 15)], [K.ColorJitter(*JITTER)], [_kornia_blur(K, kernel, 0.5)], view)
    batch = images / 255
    end = K.Normalize(torch.tensor(MEAN), torch.tensor(STD))
    pipelines = [torch.nn.Sequential(*each, end).to(images.device) for each in kinds]
    return {kind: partial(pipeline, batch) for kind, pipeline in zip(KINDS, pipelines, strict=True)}


def _kornia_blur(kornia: Any, kernel: int, probability: float) -> Any:
    return kornia.RandomGaussianBlur((kernel, kernel), SIGMA, p=probability)


@functools.cache
def _define_missing_operators() -> torch.library.Library:
    """Without these, torchvision cannot be imported beside a CPU build of torch. They are not used here."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def torchvisions(images: Tensor, on_pillows: bool) -> dict[str, Run]:
    _define_missing_operators()
    v2 = peers.peer("torchvision.transforms.v2")
    side = images.shape[-1]
    kernel = 23 if side > 64 else 3
    crop = [v2.RandomResizedCrop(side, SCALE, interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    blur, jitter = v2.GaussianBlur(kernel, SIGMA), v2.ColorJitter(*JITTER)
    view = [*crop, v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2), blur]
    kinds = (crop, [v2.RandAugment(2, 15)], [jitter], [v2.RandomApply([blur], 0.5)], view)
    end = [*([v2.PILToTensor()] if on_pillows else []), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    rows = pillows(images) if on_pillows else list(images)
    pipelines = [v2.Compose([*each, *end]) for each in kinds]

    def run(pipeline: Any) -> Tensor:
        return torch.stack([pipeline(row) for row in rows])

    return {kind: partial(run, pipeline) for kind, pipeline in zip(KINDS, pipelines, strict=True)}


def pillows(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def pictures(count: int, side: int) -> Tensor:
    """Smooth random images with some noise, of 8 bits."""
    smooth = F.interpolate(torch.rand(count, 3, 7, 7), (side, side), mode="bicubic", align_corners=False)
    return ((smooth + 0.1 * torch.randn(count, 3, side, side)).clamp(0, 1) * 255).to(torch.uint8)


def differences() -> None:
    """What the peers do differently, measured."""
    images, small = pictures(64, 256), (64, 64)
    arrays = [np.asarray(image.resize(small, Image.Resampling.BICUBIC)) for image in pillows(images)]
    exact = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    grid = F.affine_grid(torch.eye(2, 3).repeat(64, 1, 1), [64, 3, *small], align_corners=False)
    found = {
        "hf_gr": resized_crop(images / 255, torch.tensor([[0, 0, 256, 256]]).repeat(64, 1), small),
        "grid_sample": F.grid_sample(images / 255, grid, "bicubic", "border", align_corners=False),
    }
    same, drawn = pictures(1, 32).repeat(64, 1, 1, 1), {"hf_gr": ours}
    try:
        crop = peers.peer("kornia.augmentation").RandomResizedCrop(
            small, scale=(1, 1), ratio=(1, 1), resample="bicubic"
        )
        found["kornia"], drawn["kornia"] = crop(images / 255), kornias
    except ImportError:
        pass
    print("\nCrops of 256 pixels resized to 64: the mean difference from Pillow's, of 255\n")
    for name, crops in found.items():
        print(f"- {name}: {(crops * 255 - exact).abs().mean():.2f}")
    print("\nA batch of 64 times the same image: how many different ones come out, the median of nine batches\n")
    for name, create in drawn.items():
        kinds = create(same)
        for kind in KINDS[1:3]:
            counts = []
            for seed in range(9):
                torch.manual_seed(seed)
                counts.append(len({tuple(image.flatten().mul(100).round().tolist()) for image in kinds[kind]()}))
            print(f"- {name}, {kind}: {statistics.median(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder with kornia")
    options = parser.parse_args()
    peers.folders += [options.peers] if options.peers else []
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{date.today()}, hf_gr {__version__}, torch {torch.__version__}, {', '.join(peers.versions())}")
    differences()


if __name__ == "__main__":
    main()
