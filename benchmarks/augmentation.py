"""Images per second and memory of augmentation, beside torchvision's and kornia's, and what these do differently.

    pip install --target PEERS kornia torchvision
    python benchmarks/augmentation.py --peers PEERS

A peer that is not there is left out. All contestants get images that are already decoded and return a normalized batch.
hf_gr and kornia get a batch of floats; torchvision gets one image after the other, as in a data loader, as tensors of
8 bits or as Pillow's. All run in one process and on one thread, interleaved in a new order each round. What is reported
are medians, of the CPU time, which other processes disturb less than that of a clock.
"""

import argparse
import functools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import torch
from gr_step import LiveBytes
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_gr import __version__
from hf_gr.data.augmentation import Augmentation, barlow_twins_views, resized_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, JITTER, SIGMA = (0.08, 1.0), (0.4, 0.4, 0.2, 0.1), (0.1, 2.0)
KINDS = ("crop and flip", "RandAugment(2, 15)", "color jitter", "blur, half of the images", "a view of Barlow Twins")
Contestant = Callable[[], Tensor]


def ours(images: Tensor) -> dict[str, Contestant]:
    options = (
        {"crop_scale": SCALE, "flip": 0.5},
        {"rand_augment": (2, 15)},
        {"color_jitter": JITTER},
        {"blur": 0.5, "blur_sigma": SIGMA},
    )
    augmentations = [*(Augmentation(MEAN, STD, **each) for each in options), barlow_twins_views(None, MEAN, STD)[0]]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    batch = (images / 255 - mean) / std
    return {kind: partial(augment, batch) for kind, augment in zip(KINDS, augmentations, strict=True)}


def kornias(images: Tensor) -> dict[str, Contestant]:
    from kornia import augmentation as K
    from kornia.augmentation.auto import RandAugment

    side = images.shape[-1]
    kernel = 23 if side > 64 else 3  # a tenth of the image, as in BYOL
    crop = [K.RandomResizedCrop((side, side), scale=SCALE, resample="bicubic"), K.RandomHorizontalFlip()]
    view = [*crop, K.ColorJitter(*JITTER, p=0.8), K.RandomGrayscale(p=0.2), _kornia_blur(K, kernel, 1.0)]
    kinds = (crop, [RandAugment(2, 15)], [K.ColorJitter(*JITTER)], [_kornia_blur(K, kernel, 0.5)], view)
    batch = images / 255
    pipelines = [torch.nn.Sequential(*each, K.Normalize(torch.tensor(MEAN), torch.tensor(STD))) for each in kinds]
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


def torchvisions(images: Tensor, on_pillows: bool) -> dict[str, Contestant]:
    _define_missing_operators()
    from torchvision.transforms import InterpolationMode, v2

    side = images.shape[-1]
    kernel = 23 if side > 64 else 3
    crop = [v2.RandomResizedCrop(side, SCALE, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
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


def measured(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time of each, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name in random.sample(list(contestants), len(contestants)):
            start = time.process_time()
            contestants[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def peak_memory(run: Contestant) -> float:
    """The peak of the tensors that `run` creates, in units of the batch that it returns."""
    with LiveBytes() as peak:
        size = run().nbytes
    return peak.peak / size


def throughput(images: Tensor, rounds: int) -> None:
    creators = {
        "hf_gr": ours,
        "kornia": kornias,
        "torchvision, tensors": partial(torchvisions, on_pillows=False),
        "torchvision, Pillow": partial(torchvisions, on_pillows=True),
    }
    contestants = {}
    for name, create in creators.items():
        try:
            contestants[name] = create(images)
        except ImportError as error:
            print(f"{name}: left out ({error}).\n")
    n, side = len(images), images.shape[-1]
    print(f"\n{n} images of {side} x {side} pixels: images per second, and the peak of memory in batches\n")
    print("| | " + " | ".join(contestants) + " |\n|---|" + "---|" * len(contestants))
    for kind in KINDS:
        runs = {name: kinds[kind] for name, kinds in contestants.items()}
        seconds = measured(runs, rounds)
        cells = []
        for name, run in runs.items():
            memory = "" if name.endswith("Pillow") else f" ({peak_memory(run):.1f})"
            cells.append(f"{n / statistics.median(seconds[name]):,.0f}{memory}")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


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
        from kornia.augmentation import RandomResizedCrop

        crop = RandomResizedCrop(small, scale=(1, 1), ratio=(1, 1), resample="bicubic")
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


def load() -> str:
    return ", ".join(f"{load:.1f}" for load in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder with kornia and torchvision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs=2, default=[256, 256], help="of images of 32 and of 224 pixels")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(options.peers)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    print(f"{date.today()}, hf_gr {__version__}, torch {torch.__version__}, {os.cpu_count()} CPUs, load {load()}")
    for side, count in zip((32, 224), options.batches, strict=True):
        throughput(pictures(count, side), options.rounds)
    differences()
    print(f"\nLoad at the end: {load()}")


if __name__ == "__main__":
    main()
