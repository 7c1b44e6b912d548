"""Sharded parameters (DTensor, as FSDP2 makes them): the part that a process holds, and sums over all parts.

Elementwise arithmetic needs no more than the part, whose position in the whole does not matter. A norm, a count or an
order statistic of the whole is made of one number per process, summed over those that hold different parts.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from .tensors import local

#: A mesh of processes, and along which of its dimensions a DTensor is sharded; None for an ordinary tensor.
Layout = tuple[Any, tuple[int, ...]] | None


def layout_of(t: Any) -> Layout:
    if not hasattr(t, "device_mesh"):
        return None
    return t.device_mesh, tuple(dim for dim, placement in enumerate(t.placements) if not placement.is_replicate())


def local_grad(p: Any) -> Tensor:
    """The same part of `.grad` as `local(p)` is of `p`."""
    grad: Any = p.grad
    if layout_of(p) is not None and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    part: Tensor = local(grad)
    return part


def part_like(p: Any, whole: Tensor) -> Tensor:
    """`whole`, of which each process has a copy, distributed as `p` is; as it is if `p` is an ordinary tensor."""
    if layout_of(p) is None or layout_of(whole) is not None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def sum_over_parts_(values: Tensor, layout: Layout) -> Tensor:
    """Sum `values` in place over the processes that hold different parts of tensors of that layout: one all-reduce for
    each dimension of the mesh along which they are sharded. FSDP2, also with replicas, has one such dimension."""
    if layout is not None:
        mesh, dims = layout
        for dim in dims:
            dist.all_reduce(values, group=mesh.get_group(dim))
    return values


def require_parts(p: Any, name: str) -> None:
    """Raise `ValueError` for a DTensor whose parts do not make up the whole, or are not where its processes talk."""
    if layout_of(p) is None:
        return
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"{name} around a parameter with the placements {p.placements}: partial sums have no norm and no order. "
            "Shard or replicate it, as FSDP2 does."
        )
    if p.device.type not in (p.device_mesh.device_type, "meta"):
        raise ValueError(
            f"{name} around a parameter on {p.device.type}, of processes that communicate on "
            f"{p.device_mesh.device_type}: not tested. Leave the CPU offload out."
        )
