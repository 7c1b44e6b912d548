"""What augmentation costs: images per second, beside kornia's and torchvision's."""

from functools import partial

import torch
from augmentation import KINDS, kornias, ours, pictures, torchvisions
from comparison import Bench, Comparison, Fact, Group, Row
from timing import peak_bytes

OURS = "augmentation"
PEERS = {
    "kornia": kornias,
    "torchvision, tensors": partial(torchvisions, on_pillows=False),
    "torchvision, Pillow": partial(torchvisions, on_pillows=True),
}


def bench(kind: str, count: int, side: int, device: str) -> Bench:
    torch.manual_seed(0)
    images = pictures(count, side)
    kinds = {OURS: ours(images.to(device))[kind]}
    for name, create in PEERS.items():
        try:
            kinds[name] = create(images.to(device) if name == "kornia" else images)[kind]
        except ImportError:
            continue

    def memory() -> float:
        return peak_bytes(kinds[OURS], [], device) / (4 * images.nbytes)  # 8 bits become 32

    return Bench(kinds, facts=[Fact("memory of augmentation", memory, unit="batches")], images=count)


ROWS = tuple(Row(OURS, (name,), cpu_only=name != "kornia") for name in PEERS)


def comparisons(tiny: bool) -> list[Comparison]:
    sizes = ((4, 32), (2, 48)) if tiny else ((256, 32), (16, 224))
    return [
        Comparison(f"{kind}, {count} images of {side} pixels", ROWS, partial(bench, kind, count, side), rounds)
        for (count, side), rounds in zip(sizes, (7, 5), strict=True)
        for kind in KINDS
    ]


GROUP = Group(
    "Augmentation",
    "Of decoded images, up to a normalized batch. hf_gr and kornia get a batch of floats; torchvision gets one image "
    "of 8 bits after the other, and in training runs in the workers of a data loader, beside the model. kornia's "
    "crops are not antialiased, and its RandAugment draws once per batch (`benchmarks/augmentation.py`). Memory is "
    "the peak, in units of the batch.",
    comparisons,
)
