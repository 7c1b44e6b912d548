"""Muon for the hidden matrices of a model, AdamW for everything else: torch's own two, as one optimizer."""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .fisher import layer_kinds
from .gradient_regularization import HALF_PRECISION

Group = dict[str, Any]

CITATION = """\
@misc{jordan2024muon,
  title  = {Muon: An Optimizer for Hidden Layers in Neural Networks},
  author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz and Newhouse, Laker and Bernstein, Jeremy},
  year   = {2024},
  url    = {https://kellerjordan.github.io/posts/muon/}
}

@article{liu2025muon,
  title  = {Muon is Scalable for LLM Training},
  author = {Liu, Jingyuan and Su, Jianlin and others},
  year   = {2025},
  url    = {https://arxiv.org/abs/2502.16982}
}"""  # noqa: E501


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trainable matrices of `model` apart from embeddings and the output layer, which Muon is not meant for."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = set() if head is None else set(head.parameters())
    kinds = layer_kinds(model).items()
    return [p for p, kind in kinds if p.ndim == 2 and kind not in ("embedding", "head") and p not in outside]


class Muon(Optimizer):
    """Muon for hidden matrices, AdamW for embeddings, output layers, norms, biases and convolutions.

        B = momentum B + (1 - momentum) g,    D = momentum B + (1 - momentum) g    (without Nesterov: D = B)
        w = (1 - lr weight_decay) w - lr s NS(D)

    for a matrix w of a x b with gradient g. NS, `ns_steps` steps of Newton-Schulz in bfloat16, brings all singular
    values near 1. With s = 0.2 sqrt(max(a, b)) ("match_rms_adamw") a step has the size of one of AdamW, so that both
    share one learning rate; without it s = sqrt(max(1, a/b)). Sources: Jordan et al., 2024; Liu et al., 2025,
    section 2.2. The steps are those of `torch.optim.Muon` and `torch.optim.AdamW`.

    Args:
        params: parameters or groups of them. A group may have `hidden`, a list that tells for each parameter whether it
            is one.
        lr: learning rate of both.
        weight_decay: of both, decoupled.
        momentum: Muon's momentum.
        nesterov: whether Muon looks ahead by one step of its momentum.
        ns_steps: number of Newton-Schulz iterations.
        match_rms_adamw: whether a step of Muon has the size of one of AdamW.
        betas: decay rates of AdamW's two averages.
        eps: AdamW's term in the denominator.
        hidden: the parameters that Muon trains, see `hidden_matrices`. Default: all matrices.

    Raises:
        ValueError: an argument is out of its range; a parameter is sharded, complex, or in half precision; `hidden` is
            empty; torch is older than 2.9, which has no Muon.
        RuntimeError: a gradient is sparse.
    """

    help = "Muon for hidden matrices and AdamW for the rest, with one learning rate"
    latex = (
        r"B \leftarrow m B + (1 - m)\, g, \qquad w \leftarrow (1 - a W)\, w - a s\, \mathrm{NS}(m B + (1 - m)\, g),"
        r" \qquad s = 0.2 \sqrt{\max(\mathrm{rows}, \mathrm{columns})}"
    )
    citation = CITATION
    symbols = {"momentum": "m"}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        match_rms_adamw: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        hidden: Collection[Tensor] | None = None,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optim=muon needs torch 2.9 or later, and this is {torch.__version__}. Upgrade torch.")
        if hidden is not None and not hidden:
            raise ValueError("optim=muon: the model has no hidden matrix for it. Use adamw_torch.")
        self._hidden = hidden if hidden is None else set(hidden)
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "match_rms_adamw": match_rms_adamw,
                "betas": betas,
                "eps": eps,
                "decoupled_weight_decay": True,  # IRE asks for it
            },
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_hidden", None)  # a copy knows its hidden parameters by its groups
        for values in self.state.values():
            if "step" in values and not isinstance(values["step"], Tensor):
                values["step"] = torch.tensor(float(values["step"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `ValueError` for the state of another optimizer, and changes nothing."""
        if any("hidden" not in group for group in state_dict["param_groups"]):
            raise ValueError("This state is not one of Muon: it does not tell which parameters are hidden matrices.")
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        chosen = self._hidden
        group.setdefault("hidden", [p.ndim == 2 and (chosen is None or p in chosen) for p in group["params"]])
        try:
            self._check(group)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check(self, group: Group) -> None:
        """Raise `ValueError` for a setting out of its range."""
        _check_parameters(group["params"], group["hidden"])
        for key in ("lr", "weight_decay", "eps"):
            if not 0 <= group[key] < math.inf:
                raise ValueError(f"{key}={group[key]}: must be >= 0, and finite.")
        if not all(0 <= value < 1 for value in (group["momentum"], *group["betas"])):
            raise ValueError(f"momentum={group['momentum']}, betas={group['betas']}: each must be in [0, 1).")
        if not 1 <= group["ns_steps"] < 100:
            raise ValueError(f"ns_steps={group['ns_steps']}: give 1 to 99; 5 is usual.")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. `closure`, if there is one, computes the loss and the gradients first; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shared = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            pairs = list(zip(group["params"], group["hidden"], strict=True))
            if matrices := [p for p, is_hidden in pairs if is_hidden]:
                adjust = "match_rms_adamw" if group["match_rms_adamw"] else "original"
                own = {key: group[key] for key in ("momentum", "nesterov", "ns_steps")}
                self._step_by(torch.optim.Muon(matrices, **shared, **own, adjust_lr_fn=adjust))
            if others := [p for p, is_hidden in pairs if not is_hidden]:
                self._step_by(AdamW(others, **shared, betas=group["betas"], eps=group["eps"]))
        return loss

    def _step_by(self, optimizer: Any) -> None:
        optimizer.state = self.state
        optimizer.step()


def _check_parameters(params: list[Tensor], hidden: list[bool]) -> None:
    """Raise `ValueError` for parameters that cannot be trained."""
    if len(hidden) != len(params):
        raise ValueError(f"hidden={hidden}: give True or False for each of the {len(params)} parameters.")
    for p, is_hidden in zip(params, hidden, strict=True):
        if p.is_complex() or p.dtype in HALF_PRECISION:
            raise ValueError(f"Muon and {p.dtype} parameters: keep the weights in float32, and use autocast.")
        if hasattr(p, "device_mesh"):
            raise ValueError("Muon takes whole matrices, and cannot where they are sharded (DTensor). Use DDP.")
        if is_hidden and p.ndim != 2:
            raise ValueError(f"hidden: Muon trains matrices, and one of these has the shape {tuple(p.shape)}.")
