"""IRE, the implicit regularization enhancement: longer steps along the flat coordinates, on plain tensors.

IRE wraps an optimizer that is already built. Of the step that this one takes it lengthens what lies along the
coordinates on which the loss is flat ("Improving Generalization and Convergence by Enhancing Implicit Regularization",
Wang et al., NeurIPS 2024, Algorithm 1):

    theta_new = theta_old + (1 + kappa n) (theta_base - theta_old),    n in {0, 1}^N elementwise,

where theta_base is where the base optimizer goes, and n_i = 1 for the fraction gamma of all coordinates with the
smallest h_i, a diagonal estimate of the Hessian: the squared gradient of the loss with labels drawn from the model's
own distribution. With AdamW as the base this is AdmIRE. kappa = 0 is the base optimizer, bit for bit.

    optimizer = IRE(torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True), kappa=4.0, gamma=0.6)
    for step, (inputs, labels) in enumerate(data):
        if step % 10 == 0:
            loss(model(inputs), sampled_labels).backward()
            optimizer.update_mask()
            optimizer.zero_grad()
        loss(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

Sharded parameters (DTensor, as FSDP2 makes them) have the masks that the whole ones would have: the processes add up
counts, and each amplifies the step of its part.

Like the released code, and unlike the paper's box, IRE scales the step that was really taken: momentum and decoupled
weight decay are part of it (`amplify_weight_decay=False` takes the decay out), and a gradient is clipped before. Unlike
the released code it never replaces the storage of a parameter, leaves `.grad` as it is, and saves its masks.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import Limit, check_value
from . import _cpu
from ._ire_bases import require_amplifiable, require_decoupled_decay, require_own_weights
from ._sharding import Layout, layout_of, part_like, sum_over_parts_
from .order_statistics import Scan, kth_smallest_of_each, replace_masks
from .tensors import blocks_of, local

logger = logging.getLogger(__name__)

#: Which coordinates are amplified. The last three are controls, with which to check that the choice matters.
MASKS = ("flat", "inverted", "random", "uniform")
#: Masks that are chosen by a gradient.
ESTIMATED_MASKS = ("flat", "inverted")
#: The range, or the choices, of each setting of `IRE` that is a number or a name.
SETTINGS = {
    "kappa": Limit(0, rule="must be >= 0; 0 is the base optimizer."),
    "gamma": Limit(
        0, 1, above=True, rule="the fraction of flat coordinates must be in (0, 1]; the paper has (0.5, 1)."
    ),
    "beta": Limit(0, 1, below=True, rule="must be in [0, 1); 0 uses the last estimate alone."),
    "scope": ("global", "per_tensor"),
    "mask": MASKS,
    "kappa_schedule": ("constant", "lr"),
}

CITATION = """\
@inproceedings{wang2024improving,
  title     = {Improving Generalization and Convergence by Enhancing Implicit Regularization},
  author    = {Wang, Mingze and Wang, Jinbo and He, Haotian and Wang, Zilin and Huang, Guanhua and Xiong, Feiyu and \
Li, Zhiyu and E, Weinan and Wu, Lei},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2405.20763}
}"""


class IRE(Optimizer):
    """Wrap a built optimizer so that it takes (1 + kappa) times its step on the flat coordinates.

    `param_groups`, `state` and `defaults` are the base optimizer's own objects, so that edits by learning-rate
    schedulers and other code take effect. The masks, 1 byte per trainable parameter, are kept apart, under "ire" in
    `state_dict()`. Until the first `update_mask()` a step is that of the base optimizer.

    Args:
        base_optimizer: any optimizer that updates in `step()`. A fused AdamW on a CPU is updated and amplified block by
            block; any other is stepped as it is, with a copy of the amplified parameters during the step. Refused are
            those that keep other weights beside the parameters (schedule-free, ASGD), evaluate the loss along a line
            (LBFGS), or wrap another optimizer, and parameters in half precision, which lose most of such a step.
        kappa: how much is added on flat coordinates; >= 0. 0 is the base optimizer.
        gamma: fraction of the coordinates called flat, in (0, 1]; the paper has (0.5, 1).
        scope: "global" takes the floor(gamma N) smallest values of all N coordinates together (the paper), "per_tensor"
            the floor(gamma n) smallest of each tensor.
        exclude: parameters that are never amplified. They do not count toward N.
        amplify_weight_decay: False leaves decoupled weight decay as it is. Refused where decay is part of the gradient.
        beta: decay of the moving average h <- beta h + (1 - beta) g^2 over the mask updates, with bias correction; in
            [0, 1). 0, as published, keeps no average and no buffer.
        mask: one of `MASKS`. "inverted" is what "flat" is not, "random" has each coordinate with probability gamma and
            "uniform" has all: (1 + kappa) times the base optimizer's step.
        kappa_schedule: "constant", or "lr" for kappa_t = kappa lr_t / initial_lr of each group, where `initial_lr` is
            what a learning-rate scheduler has written there (the released code's `prog_decay`).
        seed: seed of the random masks.

    Attributes:
        active: set to False while IRE should not act yet.
        kappa_scale: factor of kappa, a number or a tensor, 1 at first; saved. `GRTrainer` halves it where training
            diverges.
        updates: how many times the mask has been chosen. Read from the device when it is asked for.

    Raises:
        ValueError: an argument is out of its range, or the base optimizer or a parameter is one of those refused above.
        RuntimeError: a gradient is sparse.
    """

    help = "(1 + kappa) times the step of any optimizer along the coordinates on which the loss is flat"
    latex = r"\theta_{t+1} = \theta_t + (1 + \kappa\, n_t) \odot u_t"
    citation = CITATION
    symbols = {"kappa": "kappa", "gamma": "gamma", "interval": "K"}

    def __init__(
        self,
        base_optimizer: Optimizer,
        kappa: float = 2.0,
        gamma: float = 0.6,
        scope: str = "global",
        exclude: Iterable[Tensor] = (),
        amplify_weight_decay: bool = True,
        beta: float = 0.0,
        *,
        mask: str = "flat",
        kappa_schedule: str = "constant",
        seed: int = 0,
    ):
        given: dict[str, float | str] = {"kappa": kappa, "gamma": gamma, "beta": beta}
        given |= {"scope": scope, "mask": mask, "kappa_schedule": kappa_schedule}
        for name, value in given.items():
            check_value(name, value, SETTINGS[name])
        if isinstance(base_optimizer, IRE):
            raise ValueError("IRE around IRE amplifies twice. Give the base optimizer, and one kappa.")
        require_own_weights(base_optimizer)
        excluded = set(exclude)
        for group in base_optimizer.param_groups:
            require_amplifiable(group, excluded)
        if gamma < 0.5 and mask == "flat":
            logger.warning(f"IRE with gamma={gamma}: the paper calls more than half of the coordinates flat.")
        if not amplify_weight_decay:
            require_decoupled_decay(base_optimizer)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)  # for the hooks
        self.base_optimizer = base_optimizer
        self._share()
        # Loading gives the base new lists.
        base_optimizer.register_load_state_dict_post_hook(self._share)
        self.kappa, self.gamma, self.scope = kappa, gamma, scope
        self.amplify_weight_decay, self.beta, self.mask = amplify_weight_decay, beta, mask
        self.kappa_schedule, self.seed = kappa_schedule, seed
        self.active = True
        self.kappa_scale: Tensor | float = 1.0
        self._excluded: set[int] = set()
        self._awaited = excluded
        self._find_excluded()
        self._masks: dict[Tensor, Tensor] = {}
        self._averages: dict[Tensor, Tensor] = {}
        self._counts = _Counts()
        self._updates: Tensor | int = 0
        self._steps = 0

    def _share(self, *_: Any) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = self.base_optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "base_optimizer" not in vars(self):  # torch's __init__ comes by with groups that the base has already
            super().add_param_group(param_group)
            return
        self.base_optimizer.add_param_group(param_group)
        try:
            require_amplifiable(self.param_groups[-1], self._awaited)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._find_excluded()

    def _find_excluded(self) -> None:
        """Remember their positions: accelerate replaces parameters by sharded ones, and the memory is then freed."""
        found = {i: p for i, p in enumerate(self._parameters()) if p in self._awaited}
        self._excluded |= found.keys()
        self._awaited -= set(found.values())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    # ---- The step ----

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the base optimizer, amplified. Returns what the base optimizer returns."""
        self._steps += 1
        if not self.active or self.kappa == 0 or not self._masks:
            if self.active and self.kappa != 0 and self._steps == 1:
                logger.warning(
                    "IRE has no mask yet and steps as its base optimizer. Call update_mask() with the gradient of "
                    "sampled labels in .grad; until IRE is to start, set active = False."
                )
            return self.base_optimizer.step(closure)
        with torch.no_grad():
            if closure is None and _cpu.suits_blockwise_adamw(self.base_optimizer):
                for group, params, old, masks in _cpu.step_adamw_blockwise(self.base_optimizer, self._masks):
                    _amplify_(params, old, masks, self._kappa_of(group), self._decay_of(group))
                return None
            return self._step_any(closure)

    def _step_any(self, closure: Callable[[], float] | None) -> float | None:
        """Copy, let the base optimizer step, amplify the difference."""
        amplified = []
        for group in self.param_groups:
            kappa, decay = self._kappa_of(group), self._decay_of(group)
            # A closure computes the gradients later.
            moving = [p for p in group["params"] if p.grad is not None or closure is not None]
            lists = blocks_of([p for p in moving if p in self._masks], _cpu.step_block())
            amplified += [(params, [local(p).clone() for p in params], kappa, decay) for params in lists]
        result = self.base_optimizer.step(closure)
        while amplified:  # each copy is freed as soon as it has been used
            params, old, kappa, decay = amplified.pop()
            masks = [local(self._masks[p]).to(p.dtype) for p in params]
            _amplify_([local(p) for p in params], old, masks, kappa, decay)
        return result

    def _kappa_of(self, group: dict[str, Any]) -> Tensor | float:
        kappa = self.kappa * self.kappa_scale
        if self.kappa_schedule == "lr":
            peak = float(group.get("initial_lr", group["lr"]))
            kappa *= float(group["lr"]) / peak if peak > 0 else 0.0
        return kappa

    def _decay_of(self, group: dict[str, Any]) -> float:
        """lr * weight_decay, where that part of the step is to be left alone."""
        return 0.0 if self.amplify_weight_decay else float(group["lr"]) * group.get("weight_decay", 0.0)

    @property
    def is_acting(self) -> Tensor | bool:
        """Whether the next step is amplified: IRE is active, has a kappa, and has chosen coordinates. On a GPU a
        tensor, as the device alone knows whether the gradient of a choice was finite."""
        return self.active and self.kappa != 0 and self._updates > 0

    @property
    def kappa_now(self) -> Tensor | float:
        """kappa_t of the next step, of the first parameter group; 0 while IRE does not act. On a GPU a tensor."""
        return self._kappa_of(self.param_groups[0]) * self.is_acting

    @property
    def kappa_in_force(self) -> float:
        """`kappa_now` as a number."""
        return float(self.kappa_now)

    # ---- The mask ----

    @property
    def needs_estimate(self) -> bool:
        """Whether `update_mask` reads `.grad`; two of the controls do not."""
        return self.mask in ESTIMATED_MASKS

    @property
    def has_mask(self) -> bool:
        return bool(self._masks)

    @property
    def updates(self) -> int:
        return int(self._updates)

    @property
    def flat_fraction(self) -> float:
        """The share of the coordinates that is amplified; 0 before the first mask."""
        return sum(self.flat_counts.values()) / max(1, sum(p.numel() for p in self.flat_counts))

    @property
    def flat_counts(self) -> dict[Tensor, int]:
        """How many coordinates of each parameter are amplified."""
        return self._counts.read().flat

    @property
    def mask_overlap(self) -> float | None:
        """|A and B| / |A or B| of the last two masks (Jaccard index); None while the one before was empty, and 1 where
        a gradient that was not finite left it as it was."""
        return self._counts.read().overlap

    def _amplifiable(self) -> list[Tensor]:
        return [p for i, p in enumerate(self._parameters()) if p.requires_grad and i not in self._excluded]

    @torch.no_grad()
    def update_mask(self, only_if: Tensor | bool = True) -> Tensor:
        """Choose the flat coordinates again, from the estimate in `.grad`, which is left unchanged.

        The floor(gamma N) coordinates with the smallest squared gradient are flat, and with them every other one whose
        value equals the largest of those. A parameter without a gradient counts as zero. Constant factors, such as the
        batch size in the Gauss-Newton-Bartlett estimator, do not change the order and are left out.

        Where the gradient is not finite, or `only_if` is False, the masks, the averages and `updates` stay as they are.
        Returns whether they changed, as a 0-dimensional tensor on the device: nothing here waits for it.
        """
        params = self._amplifiable()
        changes = _are_finite(params) if self.needs_estimate else torch.tensor(True)
        changes &= only_if.to(changes.device) if isinstance(only_if, Tensor) else only_if
        # What is known to change need not be kept.
        is_chosen = None if changes.is_cpu and changes else changes
        self._updates = self._updates + (1 if is_chosen is None else changes.long())
        values, thresholds = self._values(params, is_chosen)
        for p in params:
            if p not in self._masks:
                self._masks[p] = torch.zeros_like(p, dtype=torch.uint8)
        scan = Scan(params)
        masks = [self._masks[p] for p in params]
        found = replace_masks(scan, masks, values, thresholds, self._chooser(scan), is_chosen)
        self._counts = self._counts.followed_by(params, found)
        return changes

    def _values(self, params: list[Tensor], is_chosen: Tensor | None) -> tuple[list[Tensor], Sequence[float | Tensor]]:
        """For each parameter the values whose magnitudes are compared, and the threshold."""
        if self.mask == "random":
            return [self._draw(i, p) for i, p in enumerate(params)], [self.gamma] * len(params)
        if not self.needs_estimate:
            return params, [math.nan] * len(params)
        # |g| has the order of g^2, and does not underflow.
        values = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if self.beta > 0:
            values = [self._average(p, value, is_chosen) for p, value in zip(params, values, strict=True)]
        if self.scope == "per_tensor":
            return values, kth_smallest_of_each(
                [[v] for v in values], [math.floor(self.gamma * v.numel()) for v in values]
            )
        count = math.floor(self.gamma * sum(p.numel() for p in params))
        return values, kth_smallest_of_each([values], [count]) * len(params)

    def _draw(self, index: int, p: Tensor) -> Tensor:
        """Uniform numbers, from what is saved: a resumed run draws the same, and so do processes that share `p`."""
        words = np.random.SeedSequence([self.seed, self.updates, index]).generate_state(1, np.uint64)
        # A Python int, as NumPy 1 cannot shift a uint64 by one.
        generator = torch.Generator(p.device).manual_seed(int(words[0]) >> 1)
        return part_like(p, torch.rand(p.shape, generator=generator, device=p.device))

    def _chooser(self, scan: Scan) -> Callable[[Tensor, float | Tensor], Tensor]:
        """`f(values, threshold)`: True where a coordinate is to be amplified."""
        if self.mask == "uniform":
            return lambda values, _: torch.ones_like(values, dtype=torch.bool)
        if self.mask == "random":
            return lambda values, gamma: values < gamma
        if self.mask == "inverted":
            return lambda values, threshold: scan.at_most(values, threshold).logical_not_()
        return scan.at_most

    def _average(self, p: Tensor, grad: Tensor, is_chosen: Tensor | None) -> Tensor:
        """h / (1 - beta^n) after n updates, for h <- beta h + (1 - beta) g^2, kept in its bias-corrected form."""
        if p not in self._averages:
            self._averages[p] = torch.zeros_like(p)
        average, square = local(self._averages[p]), local(grad.square())
        weight = (1 - self.beta) / (1 - self.beta**self._updates)
        if is_chosen is None:
            average.lerp_(square, weight)
        else:
            is_chosen = is_chosen.to(average.device)
            average.copy_(torch.where(is_chosen, average.lerp(square, torch.as_tensor(weight).to(average)), average))
        return self._averages[p]

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, and under "ire" the masks, averages and counters.

        The hooks of the base optimizer run around its part, those of IRE around the whole.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._full_state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            state_dict = _unless_none(after(self, state_dict), state_dict)
        return state_dict

    def _full_state_dict(self) -> dict[str, Any]:
        index = {p: i for i, p in enumerate(self._parameters())}
        return {
            **self.base_optimizer.state_dict(),
            "ire": {
                "masks": {index[p]: mask for p, mask in self._masks.items()},
                "averages": {index[p]: average for p, average in self._averages.items()},
                "flat_counts": {index[p]: count for p, count in self.flat_counts.items()},
                "mask_overlap": self.mask_overlap,
                "step": self._steps,
                "updates": self.updates,
                "kappa_scale": float(self.kappa_scale),
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Without its part "ire", as from a run that had no IRE, there is no mask.

        Raises:
            ValueError: the state is of another optimizer or of other parameters. Nothing is loaded then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _unless_none(before(self, state_dict), state_dict)
        self._load_full_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_full_state_dict(self, state_dict: dict[str, Any]) -> None:
        base = {key: value for key, value in state_dict.items() if key != "ire"}
        ire = state_dict.get("ire", {})
        params = self._parameters()
        for i, mask in (*ire.get("masks", {}).items(), *ire.get("averages", {}).items()):
            if i >= len(params) or mask.shape != params[i].shape:
                raise ValueError(
                    f"The IRE state for parameter {i}, of shape {tuple(mask.shape)}, does not fit this optimizer. "
                    "Load it into one that was made from the same parameters in the same order."
                )
        self._load_base(base)
        self._masks = {params[i]: _like(params[i], mask) for i, mask in ire.get("masks", {}).items()}
        self._averages = {params[i]: _like(params[i], value) for i, value in ire.get("averages", {}).items()}
        flat = {params[i]: count for i, count in ire.get("flat_counts", {}).items()}
        self._counts = _Counts(flat, ire.get("mask_overlap"))
        self._steps, self._updates = ire.get("step", 0), ire.get("updates", 0)
        self.kappa_scale = ire.get("kappa_scale", 1.0)

    def _load_base(self, state_dict: dict[str, Any]) -> None:
        """Load it into the base optimizer, or raise `ValueError` if it is of another one."""
        before = self.base_optimizer.state_dict()
        try:
            self.base_optimizer.load_state_dict(state_dict)
            lacking = {key for group in self.param_groups for key in self.defaults.keys() - group.keys()}
        except KeyError as error:  # torch has looked for it
            lacking = {error.args[0]}
        if names := sorted(lacking - {"differentiable"}):  # which torch adds to the defaults alone
            self.base_optimizer.load_state_dict(before)
            raise ValueError(
                f"The state to be loaded is not of {type(self.base_optimizer).__name__}: it has no "
                f"{', '.join(names)}. Make the optimizer that it was saved from, or start without it."
            )


def _unless_none(result: dict[str, Any] | None, otherwise: dict[str, Any]) -> dict[str, Any]:
    return otherwise if result is None else result


def _amplify_(
    params: list[Tensor], old: list[Tensor], masks: list[Tensor], kappa: Tensor | float, decay: float
) -> None:
    """p += kappa mask (p - old), where `decay` times `old` is first taken out of the difference; overwrites `old`, and
    on a GPU the masks."""
    if isinstance(kappa, Tensor) and not kappa.is_cpu:
        torch._foreach_mul_(masks, kappa.to(masks[0].device))
        kappa = 1.0
    if decay:
        torch._foreach_mul_(old, 1 - decay)
    # With the difference negated, the scratch space needs no further pass.
    torch._foreach_sub_(old, params)
    torch._foreach_addcmul_(params, old, masks, value=-float(kappa))


def _like(p: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the device, and in the memory layout, of `p`."""
    return torch.empty_like(p, dtype=value.dtype).copy_(part_like(p, value.to(p.device)))


def _are_finite(params: list[Tensor]) -> Tensor:
    """Whether no gradient is infinite or NaN, on any process."""
    grads: dict[Layout, list[Tensor]] = {}
    for p in params:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise RuntimeError("IRE cannot read sparse gradients. Build embeddings with sparse=False.")
        grads.setdefault(layout_of(p.grad), []).append(local(p.grad))
    norms = [sum_over_parts_(torch.nn.utils.get_total_norm(of), layout) for layout, of in grads.items()]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all() if norms else torch.tensor(True)


@dataclass
class _Counts:
    """What the mask holds, read from the device when it is asked for.

    Attributes:
        flat: how many coordinates of each parameter are amplified.
        overlap: the Jaccard index of the last two masks.
    """

    flat: dict[Tensor, int] = field(default_factory=dict)
    overlap: float | None = None
    #: The parameters; on the device their counts, and how many coordinates both masks have; how many the last one had.
    _unread: tuple[list[Tensor], Tensor, Tensor] | None = None

    def followed_by(self, params: list[Tensor], found: Tensor) -> "_Counts":
        """The counts of the next mask."""
        last = sum(self.flat.values()) if self._unread is None else self._unread[1][:-1].sum()
        return _Counts(_unread=(params, found, torch.as_tensor(last)))

    def read(self) -> "_Counts":
        if self._unread is not None:
            params, found, last = self._unread
            (*counts, common), n_last = found.tolist(), int(last)
            self.flat = dict(zip(params, counts, strict=True))
            self.overlap = common / (n_last + sum(counts) - common) if n_last else None
            self._unread = None
        return self
