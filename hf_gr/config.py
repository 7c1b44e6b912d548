"""Every flag of the project: its name, help, default and validation."""

import math
from collections import ChainMap
from dataclasses import MISSING, dataclass, field, is_dataclass
from inspect import signature
from typing import Any, NamedTuple

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from .checks import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    STEPS,
    Limit,
    Needs,
    check_fields,
    check_numbers,
    flag,
    without_effect,
)
from .optim import IRE, OPTIMIZERS
from .optim.ascents import ASCENTS
from .optim.gr_warmup import GR_WARMUPS, GRStrength, gr_strength, is_between
from .optim.ire import ESTIMATED_MASKS, SETTINGS
from .optim.radius_rules import RADIUS_RULES
from .optim.second_passes import SECOND_PASSES

GR_SCOPES = ("global", "local", "micro")
ON_NONFINITE = ("stop", "skip")
#: The schedule of hf_gr, next to those of transformers.
TIME_VARYING = "time_varying"
LR_SCALINGS = ("none", "linear", "sqrt")
#: The batch size at which `lr_scaling` leaves the learning rate as it is.
BASE_BATCH_SIZE = 256
#: Upper bounds of r and lambda, and of lambda / r: beyond them float32 overflows before anything is learned.
MAX_RADIUS = 1e6
MAX_RATIO = 1e6


class GRPreset(NamedTuple):
    """A named method: what `--help` says of it, and the flags it sets."""

    help: str
    flags: dict[str, Any]


#: Settings in the published range: kappa 2 to 4 for Llamas, 20 and 50 for ViTs on CIFAR, 1 and 2 for CNNs (the
#: authors' replies to the reviewers), ViT on ImageNet as in Table 4 of the paper; gamma as there or in the released
#: commands. Without `ire_start_step` IRE starts at the end of the learning-rate warmup.
IRE_PRESETS: dict[str, dict[str, float]] = {
    "llama": {"ire_kappa": 4.0, "ire_gamma": 0.6},
    "vit_imagenet": {"ire_kappa": 2.0, "ire_gamma": 0.8, "ire_start_step": 1 / 3},
    "vit_cifar": {"ire_kappa": 20.0, "ire_gamma": 0.6},
    "cnn": {"ire_kappa": 1.0, "ire_gamma": 0.9},
}
#: Named settings of GR. Their r is where to begin, and is tuned to nothing. Late SAM is "Sharpness-Aware Minimization
#: Efficiently Selects Flatter Minima Late in Training", Zhou et al., ICLR 2025. The r of lora_sam is the best one for
#: both factors of LoRA in arXiv:2409.14396.
GR_PRESETS: dict[str, GRPreset] = {
    "gr_paper": GRPreset("GR with zero-warmup, as in the GR paper", {"gr_r": 0.1, "gr_warmup": "zero"}),
    "sam": GRPreset("SAM in every step", {"gr_r": 0.05, "gr_warmup": "none"}),
    "late": GRPreset("SAM in the last fifth of the run", {"gr_r": 0.05, "gr_warmup": "zero", "gr_warmup_steps": 0.8}),
    "asam": GRPreset("ASAM in every step", {"gr_r": 0.5, "gr_warmup": "none", "gr_ascent": "adaptive"}),
    "msam": GRPreset(
        "MSAM after the learning-rate warmup, in one pass",
        {"gr_r": 1.0, "gr_warmup": "zero", "gr_ascent": "momentum"},
    ),
    "lora_sam": GRPreset("SAM in every step, for the adapters of LoRA", {"gr_r": 0.003, "gr_warmup": "none"}),
    "looksam": GRPreset(
        "SAM in every fifth step, reused in the others",
        {"gr_r": 0.05, "gr_warmup": "none", "gr_interval": 5, "gr_reuse": 0.7},
    ),
}
#: Flags of transformers that, out of these ranges, silently make the weights non-finite.
TRAINING_LIMITS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), SHARE),
}
_PUBLISHED = f"and at most {MAX_RADIUS:g}; the paper has 0.05 and 0.1"
RADIUS = Limit(
    0, MAX_RADIUS, True, rule=f"the radius must be > 0 {_PUBLISHED}. To turn GR off, set gr_lambda=0 instead."
)
DEGREE = Limit(0, MAX_RADIUS, rule=f"the degree must be >= 0 (0 turns GR off) {_PUBLISHED}. None is gr_lambda = gr_r.")
MOMENTUM_RADIUS = Limit(0, MAX_RADIUS, rule=f"the radius must be >= 0 (0 is none) and at most {MAX_RADIUS:g}.")
INTERVAL = Limit(1, rule="must be a whole number of steps, at least 1.")


class _Unset:
    """Default of a flag that a preset may set. It equals and prints as its value; its class tells it from the same
    value given by the user."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return str(self.value)

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, _Unset) else other))

    def __hash__(self) -> int:
        return hash(self.value)


def _settle(args: Any, kind: type, preset: dict[str, Any]) -> None:
    """Set the flags of `kind`, its parents' excluded, that were not given to the values of the preset, or to their
    defaults as plain values."""
    for name in kind.__annotations__:
        value = getattr(args, name)
        if isinstance(value, _Unset):
            setattr(args, name, preset.get(name, value.value))


def _default(name: str) -> Any:
    return TrainingArguments.__dataclass_fields__[name].default


@dataclass
class OptimizerArguments:
    """The flags of the optimizer; see `hf_gr.optim`. Two extend the choices of transformers."""

    optim: str = flag(
        _default("optim"),
        "The optimizer; `hf-gr optimizers` lists them. It is a name that transformers knows, or one of hf_gr's own.",
        ChainMap[str, Any](OPTIMIZERS, dict.fromkeys(name.value for name in OptimizerNames)),
    )
    lr_scheduler_type: str = flag(
        _default("lr_scheduler_type"),
        "The learning-rate schedule. One of transformers' names, or time_varying, the factor phi of TVLARS for any "
        "other optimizer: 1/(alpha + exp(tv_lambda (t - delay_steps))) + gamma_min, with these four in "
        "lr_scheduler_kwargs.",
        [*(name.value for name in SchedulerType), TIME_VARYING],
    )
    lr_scaling: str = flag(
        "none",
        "Scale the learning rate with the total batch size. linear: multiply it by the total batch size / "
        f"{BASE_BATCH_SIZE}; sqrt: by the square root of that.",
        LR_SCALINGS,
    )
    decay_norms_and_biases: bool = flag(
        False,
        "Also apply weight_decay to norms and biases. The code released with the GR paper does; Trainer exempts them.",
    )
    layer_statistics_steps: int = flag(
        0,
        "Record the weight norm and the gradient norm of each layer every this many steps, and with LARS, TVLARS or "
        "LAMB its learning rate. They are in layer_statistics.parquet and .png in the output folder. 0 turns this off.",
        Limit(0, rule="must be a whole number of steps, or 0 (off)."),
    )

    def __post_init__(self):
        self.check_optimizer_arguments()
        if not hasattr(super(), "__post_init__"):
            return  # these flags stand alone
        # transformers converts both to its enums, which lack our names.
        own = {"optim": OPTIMIZERS, "lr_scheduler_type": (TIME_VARYING,)}
        chosen = {name: getattr(self, name) for name, ours in own.items() if getattr(self, name) in ours}
        for name in chosen:
            setattr(self, name, _default(name))
        super().__post_init__()
        for name, value in chosen.items():
            setattr(self, name, value)

    def __init_subclass__(cls, **kwargs):
        """Keep the defaults that the configuration behind these flags sets for the two flags redeclared here."""
        super().__init_subclass__(**kwargs)
        if issubclass(cls.__mro__[1], TrainingArguments):
            return  # it has chosen
        behind = [c.__dataclass_fields__ for c in cls.__mro__ if is_dataclass(c) and not issubclass(c, __class__)]
        for name in ("optim", "lr_scheduler_type"):
            default = next((fields[name].default for fields in behind if name in fields), MISSING)
            if default is not MISSING and name not in vars(cls):
                ours = OptimizerArguments.__dataclass_fields__[name]
                setattr(cls, name, field(default=getattr(default, "value", default), metadata=ours.metadata))
                cls.__annotations__ = {**vars(cls).get("__annotations__", {}), name: ours.type}

    def check_optimizer_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range."""
        check_fields(self, OptimizerArguments)
        if self.optim == "tvlars" and self.lr_scheduler_type == TIME_VARYING:
            raise ValueError(
                f"lr_scheduler_type={TIME_VARYING!r}: TVLARS has this schedule in itself and would apply it twice. Set "
                "lr_scheduler_type=constant, or optim=lars."
            )

    def lr_factor(self, total_batch_size: int) -> float:
        """The factor that `lr_scaling` applies to the learning rate."""
        scale = total_batch_size / BASE_BATCH_SIZE
        return {"none": 1.0, "linear": scale, "sqrt": math.sqrt(scale)}[self.lr_scaling]


@dataclass
class IREArguments:
    """The flags of IRE; see `hf_gr.optim.ire`."""

    ire_kappa: float = flag(
        _Unset(0.0),
        "kappa: the optimizer takes (1 + kappa) times its step along flat coordinates. 0 turns IRE off. With AdamW as "
        "the optimizer this is AdmIRE, with SGD SGD-IRE, with gr_lambda SAM-IRE or GR-IRE.",
        SETTINGS["kappa"],
    )
    ire_gamma: float = flag(
        _Unset(0.6),
        "gamma: the fraction of all coordinates treated as flat, in (0, 1]. The paper uses (0.5, 1).",
        SETTINGS["gamma"],
    )
    ire_interval: int = flag(10, "K: choose the flat coordinates anew every K optimizer steps.", INTERVAL)
    ire_start_step: float | None = flag(
        _Unset(None),
        "The step at which IRE starts; below 1, a fraction of all steps. None means the end of the learning-rate "
        "warmup (warmup_steps).",
        STEPS,
    )
    ire_probe_fraction: float = flag(
        1.0,
        "Share of the step's samples that choose the flat coordinates, in (0, 1]. 1 costs an extra forward and "
        "backward pass every ire_interval steps; smaller fractions cost less.",
        Limit(0, 1, above=True, rule="must be in (0, 1]."),
    )
    ire_preset: str | None = flag(
        None,
        "Set ire_kappa, ire_gamma, and ire_start_step to published values. Flags that you give take precedence.",
        IRE_PRESETS,
    )
    ire_mask: str = flag(
        "flat",
        "Which coordinates are amplified. flat is IRE; as controls, which show whether the choice matters, all others "
        "(inverted), the same fraction at random (random), or all (uniform).",
        SETTINGS["mask"],
    )
    ire_kappa_schedule: str = flag(
        "constant", "constant, or lr: kappa proportional to the learning rate.", SETTINGS["kappa_schedule"]
    )
    ire_scope: str = flag(
        "global",
        "What gamma is a fraction of. global: all parameters together (the paper); per_tensor: each tensor.",
        SETTINGS["scope"],
    )
    ire_exclude: list[str] | None = flag(  # noqa: RUF009
        None, "Never amplify parameters with one of these words in their names, e.g. embed norm bias."
    )
    ire_beta: float = flag(
        0.0,
        "Decay of a moving average of the estimate over its updates, in [0, 1). 0 uses the latest estimate alone.",
        SETTINGS["beta"],
    )
    ire_amplify_weight_decay: bool = flag(
        True, "Amplify decoupled weight decay with the rest of the step. The released code does."
    )
    ire_guard: float = flag(
        3.0,
        "Halve kappa if the loss diverges. It does if it is not finite, or exceeds both this many times its running "
        "mean and its level when IRE started. 0 turns this off.",
        Limit(1, above=True, off=0, rule="must be more than 1, how many times its mean the loss may be, or 0 (off)."),
    )

    def __post_init__(self):
        check_fields(self, IREArguments, ["ire_preset"])
        _settle(self, IREArguments, IRE_PRESETS[self.ire_preset] if self.ire_preset else {})
        self.check_ire_arguments()
        # The other half of the class is a TrainingArguments, except where these flags stand alone.
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    def check_ire_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range. Called again as training starts: a sweep sets attributes."""
        check_fields(self, IREArguments)

    def get_ire_start_step(self, lr_warmup_steps: int, num_training_steps: int) -> int:
        """How many steps precede the first one of IRE."""
        return _as_steps(self.ire_start_step, lr_warmup_steps, num_training_steps)

    def ire_settings(self) -> dict[str, Any]:
        """The arguments of `IRE` that are flags, by their names there."""
        flags = {name: f"ire_{name}" for name in signature(IRE).parameters}
        return {name: getattr(self, flag) for name, flag in flags.items() if hasattr(self, flag)}

    def ire_flags_of_the_optimizer(self) -> list[str]:
        """The flags that were set and that are arguments of `IRE`, kappa apart."""
        defaults = {name: IREArguments.__dataclass_fields__[f"ire_{name}"].default for name in self.ire_settings()}
        return [f"ire_{k}" for k, v in self.ire_settings().items() if v != defaults[k] and k != "kappa"]


def _as_steps(value: float | None, default: int, num_training_steps: int) -> int:
    """A number of steps, or a fraction of all, rounded up as `TrainingArguments.get_warmup_steps` does."""
    if value is None:
        return default
    return math.ceil(value * num_training_steps) if value < 1 else int(value)


@dataclass
class GRArguments(IREArguments, OptimizerArguments):
    """The flags of gradient regularization, IRE and the optimizers, to be put in front of any `TrainingArguments`:

    ```python
    @dataclass
    class MyConfig(GRArguments, Seq2SeqTrainingArguments):
        pass
    ```

    `GRConfig` is this for `TrainingArguments` itself. Raises `ValueError` for values that make no sense.
    """

    gr_preset: str | None = flag(
        None, "Set the other gr_ flags as a named method does. Any of them that is given takes precedence.", GR_PRESETS
    )
    gr_r: float = flag(
        _Unset(0.1),
        "r, the radius of the perturbation r d at which the second gradient is taken. The paper uses 0.05 and 0.1 "
        "for hundreds of epochs; small models and short runs need less, wrong labels more.",
        RADIUS,
    )
    gr_lambda: float | None = flag(
        None,
        "lambda, the degree of regularization: the step uses (1 - lambda/r) g1 + (lambda/r) g2. None means equal to "
        "gr_r, which is SAM; 0 turns gradient regularization off.",
        DEGREE,
    )
    gr_ascent: str = flag(
        _Unset("gradient"), "The direction d of the perturbation, along which the second gradient is taken.", ASCENTS
    )
    gr_radius_rule: str = flag(
        "fixed", "How the radius of a step is computed from r. lambda / r stays as set.", RADIUS_RULES
    )
    gr_r_max: float = flag(1.0, "Upper bound of the radius, for gr_radius_rule=gradient and loss; > 0.", POSITIVE)
    gr_second_pass_kind: str = flag("full", "The gradient of the second pass, at the perturbed weights.", SECOND_PASSES)
    gr_clip: float = flag(
        0.0,
        "Clip g1 and g2, each to this norm, before they are mixed. With gr_radius_rule=gradient the radius follows the "
        "clipped norm. For reinforcement learning the literature has 10. 0 turns it off.",
        NOT_NEGATIVE,
    )
    gr_warmup: str = flag(_Unset("zero"), "How GR starts: the GR warmup.", GR_WARMUPS)
    gr_warmup_steps: float | None = flag(
        _Unset(None),
        "T_w, in optimizer steps; below 1 it is a fraction of all steps. None means the steps of the learning-rate "
        "warmup (warmup_steps).",
        STEPS,
    )
    gr_scope: str = flag(
        "global",
        "Which gradient gives the direction of the perturbation. global: that of the whole optimizer step, over all "
        "micro-batches and processes (the paper); local: each process uses its own, which saves one all-reduce; "
        "micro: each micro-batch on each process uses its own (m-sharpness).",
        GR_SCOPES,
    )
    gr_interval: int = flag(
        _Unset(1),
        "After the warmup, regularize only every k-th step. With plain steps in between, a step costs about 1 + 1/k "
        "passes. 1 is the paper.",
        INTERVAL,
    )
    gr_reuse: float = flag(
        _Unset(0.0),
        "alpha of LookSAM, which reuses the last second gradient between regularized steps. They add alpha ||g1|| "
        "times the direction that it added, times lambda / r, which is 1 in its paper, with alpha 0.7. 0 turns it off.",
        NOT_NEGATIVE,
    )
    gr_momentum_r: float = flag(
        0.0,
        "r of a perturbation along the optimizer's momentum, as in MSAM, in the steps between the regularized ones of "
        "gr_interval: still one pass. Several times gr_r. 0 leaves those steps plain.",
        MOMENTUM_RADIUS,
    )
    gr_on_nonfinite: str = flag(
        "stop",
        "A step with an infinite or NaN gradient is skipped with a warning. stop: three in a row end the run with an "
        "error; skip: the run continues. Applies to runs with GR or IRE.",
        ON_NONFINITE,
    )
    gr_diagnostics_steps: int = flag(
        0,
        "Every this many steps, log the spread of Adam's adaptive learning rates, how much the step changed them, and "
        "the cosine of both gradients; every tenth time the preconditioned sharpness, for some fifty passes; every "
        "epoch the mean of ||g1||. The run stays the same. 0 turns this off.",
        Limit(0, rule="must be a whole number of steps, or 0 (off)."),
    )
    gr_half_precision_weights: bool = flag(
        False,
        "Allow trainable weights in bf16 or fp16. A perturbation would be lost to their rounding: the perturbed copy "
        "and the second pass use float32. One process only, without --bf16 or --fp16.",
    )

    def __post_init__(self):
        check_fields(self, GRArguments, ["gr_preset"])
        _settle(self, GRArguments, GR_PRESETS[self.gr_preset].flags if self.gr_preset else {})
        self.check_gr_arguments()
        if isinstance(self, TrainingArguments):
            check_numbers(self, TrainingArguments, TRAINING_LIMITS)
        super().__post_init__()

    def check_gr_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range. Called again as training starts: a sweep sets attributes."""
        check_fields(self, GRArguments)
        if self.gr_degree / self.gr_r > MAX_RATIO:
            raise ValueError(
                f"gr_lambda={self.gr_degree}: must be at most {MAX_RATIO:g} times gr_r={self.gr_r}. Raise gr_r, or "
                "leave gr_lambda out for gr_lambda = gr_r."
            )
        if self.gr_reuse != 0 and self.gr_scope != "global":
            raise ValueError(
                f"gr_reuse={self.gr_reuse}: gr_scope={self.gr_scope!r} has a gradient of its own on each process or "
                "micro-batch, and none to reuse for all. Use gr_scope=global."
            )
        if self.gr_clip != 0 and self.gr_scope != "global":
            raise ValueError(
                f"gr_clip={self.gr_clip}: it is the norm of the gradient of a whole step, which gr_scope="
                f"{self.gr_scope!r} does not have. Use gr_scope=global."
            )
        if self.is_active and self.gr_passes == 1:
            self._check_one_pass()
        if self.is_active and self.gr_momentum_r != 0:
            self._check_momentum_between()

    def _check_one_pass(self) -> None:
        """Raise `ValueError` for what needs a g1, which an ascent of one pass does not have."""
        ascent = f"gr_ascent={self.gr_ascent!r} takes one pass and has no g1"
        if self.gr_degree != self.gr_r:
            raise ValueError(f"gr_lambda={self.gr_lambda}: {ascent} to mix with g2. Leave gr_lambda out.")
        if self.gr_warmup == "lambda":
            raise ValueError(f"gr_warmup='lambda': {ascent} to mix with g2. Use gr_warmup=zero or r.")
        if self.gr_radius_rule != "fixed":
            raise ValueError(f"gr_radius_rule={self.gr_radius_rule!r}: {ascent} to measure. Leave it out.")
        if self.gr_half_precision_weights:
            raise ValueError(
                f"gr_half_precision_weights=True: {ascent}, and its pass would run in half precision. Leave it out."
            )
        if self.gr_reuse != 0:
            raise ValueError(f"gr_reuse={self.gr_reuse}: {ascent} to project on, and no pass to save. Leave it out.")

    def _check_momentum_between(self) -> None:
        """Raise `ValueError` for what cannot go with `gr_momentum_r`."""
        between = f"gr_momentum_r={self.gr_momentum_r}"
        if self.gr_passes == 1:
            raise ValueError(f"{between}: gr_ascent={self.gr_ascent!r} takes one pass already. Leave one of them out.")
        if self.gr_reuse != 0:
            raise ValueError(f"{between}: gr_reuse={self.gr_reuse} is for the same steps. Leave one of them out.")
        if self.gr_half_precision_weights:
            raise ValueError(
                f"{between}: with gr_half_precision_weights its pass would run in half precision. Leave it out."
            )

    @property
    def gr_passes(self) -> int:
        """Forward and backward passes of a regularized step."""
        return ASCENTS[self.gr_ascent].passes

    @property
    def gr_degree(self) -> float:
        """lambda as a number: `gr_lambda`, or `gr_r` where it is None."""
        return self.gr_r if self.gr_lambda is None else self.gr_lambda

    @property
    def is_active(self) -> bool:
        """Whether gradient regularization is on."""
        return self.gr_degree != 0

    def describe_method(self) -> str:
        """Optimizer, GR and IRE in one line, with the forward and backward passes of a step in which both act."""
        optimizer = f"optim={getattr(self.optim, 'value', self.optim)}"
        gr, ire, passes = "no GR", "no IRE", 1.0
        if self.is_active:
            gr = f"GR with r={self.gr_r:g}, lambda={self.gr_degree:g}, gr_warmup={self.gr_warmup}"
            gr += f", gr_ascent={self.gr_ascent}" if self.gr_ascent != "gradient" else ""
            gr += f", gr_second_pass_kind={self.gr_second_pass_kind}" if self.gr_second_pass_kind != "full" else ""
            gr += f", gr_momentum_r={self.gr_momentum_r:g}" if self.gr_momentum_r != 0 else ""
            passes += (self.gr_passes - 1) / self.gr_interval
        if self.ire_kappa != 0:
            ire = f"IRE with kappa={self.ire_kappa:g}, gamma={self.ire_gamma:g}"
            passes += self.ire_probe_fraction / self.ire_interval if self.ire_mask in ESTIMATED_MASKS else 0
        cost = f"up to {passes:g} passes" if passes > 1 else "1 pass"
        return f"{optimizer}, {gr}, {ire}; {cost} per step"

    def get_gr_warmup_steps(self, lr_warmup_steps: int, num_training_steps: int) -> int:
        """T_w in optimizer steps."""
        return _as_steps(self.gr_warmup_steps, lr_warmup_steps, num_training_steps)

    def gr_strength(self, step: int, warmup_steps: int) -> GRStrength:
        """(lambda_t, r_t) for the optimizer step after `step` completed ones."""
        return gr_strength(
            step,
            r=self.gr_r,
            lambda_=self.gr_degree,
            warmup=self.gr_warmup,
            warmup_steps=warmup_steps,
            interval=self.gr_interval,
        )

    def gr_at(self, step: int, warmup_steps: int) -> tuple[GRStrength, str]:
        """(lambda_t, r_t) and the ascent, where `gr_momentum_r` fills the steps that `gr_interval` leaves out."""
        if self.is_active and self.gr_momentum_r != 0 and is_between(step, warmup_steps, self.gr_interval):
            return GRStrength(self.gr_momentum_r, self.gr_momentum_r), "momentum"
        return self.gr_strength(step, warmup_steps), self.gr_ascent

    def flags_without_effect(self, prefix: str = "") -> list[str]:
        """A message for each row of `NEEDS` with flags, of this prefix, that were set and that change nothing."""
        return [message for message in without_effect(self, NEEDS) if message.startswith(prefix)]


#: The flags that have an effect only with others. What depends on the model or the optimizer is checked where they are.
NEEDS = (
    Needs(
        set(IREArguments.__dataclass_fields__) - {"ire_kappa"}, lambda a: a.ire_kappa != 0, "ire_kappa={0.ire_kappa}"
    ),
    Needs({"ire_gamma", "ire_interval"}, lambda a: a.ire_mask != "uniform", "ire_mask={0.ire_mask!r}"),
    Needs(
        {"ire_probe_fraction", "ire_beta", "ire_scope"},
        lambda a: a.ire_mask in ESTIMATED_MASKS,
        "ire_mask={0.ire_mask!r}",
    ),
    Needs({"gr_warmup_steps"}, lambda a: a.gr_warmup != "none", "gr_warmup='none'"),
    Needs({"gr_reuse", "gr_momentum_r"}, lambda a: a.gr_interval > 1, "gr_interval=1"),
    Needs({"gr_r_max"}, lambda a: RADIUS_RULES[a.gr_radius_rule].is_capped, "gr_radius_rule={0.gr_radius_rule!r}"),
    Needs({"gr_scope", "gr_second_pass_kind", "gr_clip"}, lambda a: a.gr_passes > 1, "gr_ascent={0.gr_ascent!r}"),
    Needs({"decay_norms_and_biases"}, lambda a: getattr(a, "weight_decay", 0) != 0, "weight_decay=0"),
)


@dataclass
class GRConfig(GRArguments, TrainingArguments):
    """`transformers.TrainingArguments` plus the flags of `GRArguments`. No default of the parent is changed."""
