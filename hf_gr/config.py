"""Every flag of the project: its name, help, default and validation."""

import math
import os
import tempfile
from dataclasses import MISSING, dataclass, field, is_dataclass

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from .checks import NOT_NEGATIVE, SHARE, check_ranges, check_types, refuse_booleans, refuse_nan
from .optim.gr_warmup import GR_WARMUPS, GRStrength, gr_strength
from .optim.ire import ESTIMATED_MASKS, IRE_PRESETS, KAPPA_SCHEDULES, MASKS, SCOPES, check_ire_arguments

GR_SCOPES = ("global", "local", "micro")
ON_NONFINITE = ("stop", "skip")
#: The optimizers and the schedule that transformers does not know by name.
OPTIMIZER_NAMES = ("lamb", "lars", "tvlars")
TIME_VARYING = "time_varying"
LR_SCALINGS = ("none", "linear", "sqrt")
#: The batch for which the learning rate is meant, where it is scaled.
BASE_BATCH_SIZE = 256
#: Flags of transformers of which an optimizer makes weights that are not finite without a word.
TRAINING_LIMITS = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
}
#: Beyond them float32 overflows before anything is learned: of r and lambda, and of lambda / r.
MAX_RADIUS = 1e6
MAX_RATIO = 1e6


class _UnsetNumber(float):
    """The default of a flag that a preset may set: told by its class from the same number that somebody has given."""


class _UnsetNone:
    """The same where the default is None, which it equals and reads as."""

    def __repr__(self) -> str:
        return "None"

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _UnsetNone)

    def __hash__(self) -> int:
        return hash(None)


def _default(flag: str) -> str:
    return TrainingArguments.__dataclass_fields__[flag].default


@dataclass
class OptimizerArguments:
    """The flags of the optimizer; see `hf_gr.optimizers`. Two of them are those of transformers with more choices."""

    optim: str = field(
        default=_default("optim"),
        metadata={
            "help": "The optimizer: one of transformers' names, or tvlars, lars, lamb.",
            "choices": [*(name.value for name in OptimizerNames), *OPTIMIZER_NAMES],
        },
    )
    lr_scheduler_type: str = field(
        default=_default("lr_scheduler_type"),
        metadata={
            "help": "The learning-rate schedule: one of transformers' names, or time_varying, the factor phi of TVLARS "
            "for any other optimizer: 1/(alpha + exp(tv_lambda (t - delay_steps))) + gamma_min, with these four in "
            "lr_scheduler_kwargs.",
            "choices": [*(name.value for name in SchedulerType), TIME_VARYING],
        },
    )
    lr_scaling: str = field(
        default="none",
        metadata={
            "help": f"Multiply the learning rate by the total batch / {BASE_BATCH_SIZE} (linear), by the root of that "
            "(sqrt), or not (none).",
            "choices": list(LR_SCALINGS),
        },
    )
    decay_norms_and_biases: bool = field(
        default=False,
        metadata={
            "help": "Apply weight_decay to norms and biases, too, as the code released with the GR paper does; Trainer "
            "spares them."
        },
    )
    layer_statistics_steps: int = field(
        default=0,
        metadata={
            "help": "Every so many steps write down the weight norm, gradient norm and their ratio of each layer, in "
            "layer_statistics.parquet and .png of the output folder. 0 is off."
        },
    )

    def __post_init__(self):
        self.check_optimizer_arguments()
        if not hasattr(super(), "__post_init__"):
            return  # these flags stand alone
        # transformers turns the two into its enums, and does not know ours.
        own = {"optim": OPTIMIZER_NAMES, "lr_scheduler_type": (TIME_VARYING,)}
        chosen = {flag: getattr(self, flag) for flag, names in own.items() if getattr(self, flag) in names}
        for flag in chosen:
            setattr(self, flag, _default(flag))
        super().__post_init__()
        for flag, name in chosen.items():
            setattr(self, flag, name)

    def __init_subclass__(cls, **kwargs):
        """Keep the defaults that the configuration behind these flags has of its own for the two redeclared here."""
        super().__init_subclass__(**kwargs)
        if issubclass(cls.__mro__[1], TrainingArguments):
            return  # it has chosen
        behind = [c.__dataclass_fields__ for c in cls.__mro__ if is_dataclass(c) and not issubclass(c, __class__)]
        for flag in ("optim", "lr_scheduler_type"):
            default = next((fields[flag].default for fields in behind if flag in fields), MISSING)
            if default is not MISSING and flag not in vars(cls):
                ours = OptimizerArguments.__dataclass_fields__[flag]
                setattr(cls, flag, field(default=getattr(default, "value", default), metadata=ours.metadata))
                cls.__annotations__ = {**vars(cls).get("__annotations__", {}), flag: ours.type}

    def check_optimizer_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range."""
        check_types(self, OptimizerArguments)
        if self.optim == "tvlars" and self.lr_scheduler_type == TIME_VARYING:
            raise ValueError(
                f"lr_scheduler_type={TIME_VARYING!r}: TVLARS has this schedule in itself and would apply it twice. Set "
                "lr_scheduler_type=constant, or optim=lars."
            )
        if self.layer_statistics_steps < 0:
            raise ValueError(
                f"layer_statistics_steps={self.layer_statistics_steps}: must be a whole number of steps, or 0 (off)."
            )

    def lr_factor(self, total_batch_size: int) -> float:
        """What `lr_scaling` multiplies the learning rate by."""
        scale = total_batch_size / BASE_BATCH_SIZE
        return {"none": 1.0, "linear": scale, "sqrt": math.sqrt(scale)}[self.lr_scaling]


@dataclass
class IREArguments:
    """The flags of IRE; see `hf_gr.ire`."""

    ire_kappa: float = field(
        default=_UnsetNumber(0.0),
        metadata={
            "help": "kappa: the optimizer takes (1 + kappa) times its step on flat coordinates. 0 turns IRE off. With "
            "AdamW as the optimizer this is AdmIRE, with SGD SGD-IRE, with gr_lambda SAM-IRE or GR-IRE."
        },
    )
    ire_gamma: float = field(
        default=_UnsetNumber(0.6),
        metadata={"help": "gamma: the fraction of all coordinates called flat, in (0, 1]; the paper has (0.5, 1)."},
    )
    ire_interval: int = field(
        default=10, metadata={"help": "K: optimizer steps from one choice of the flat coordinates to the next."}
    )
    ire_start_step: float | None = field(
        default=_UnsetNone(),
        metadata={
            "help": "The first step of IRE; below 1 it is a fraction of all steps. None means the end of the "
            "learning-rate warmup (warmup_steps)."
        },
    )
    ire_probe_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the step's samples used to choose the flat coordinates, in (0, 1]. 1 costs another "
            "forward and backward pass every ire_interval steps; less costs less."
        },
    )
    ire_preset: str | None = field(
        default=None,
        metadata={
            "help": "Sets ire_kappa, ire_gamma and ire_start_step as published. Where one of these three is given, it "
            "wins.",
            "choices": list(IRE_PRESETS),
        },
    )
    ire_mask: str = field(
        default="flat",
        metadata={
            "help": "Which coordinates are amplified: the flat ones, or, as a control that shows whether the choice "
            "matters, all others (inverted), the same share at random (random), or all (uniform).",
            "choices": list(MASKS),
        },
    )
    ire_kappa_schedule: str = field(
        default="constant",
        metadata={
            "help": "constant, or lr: kappa in proportion to the learning rate.",
            "choices": list(KAPPA_SCHEDULES),
        },
    )
    ire_scope: str = field(
        default="global",
        metadata={
            "help": "Where the fraction gamma is taken: global, of all parameters together (the paper), or per_tensor.",
            "choices": list(SCOPES),
        },
    )
    ire_exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters with one of these words in their names are never amplified: embed norm bias."},
    )
    ire_beta: float = field(
        default=0.0,
        metadata={"help": "Moving average of the estimate over its updates, in [0, 1); 0 uses the last one alone."},
    )
    ire_amplify_weight_decay: bool = field(
        default=True,
        metadata={"help": "Amplify decoupled weight decay with the rest of the step, as the released code does."},
    )
    ire_guard: float = field(
        default=3.0,
        metadata={
            "help": "If the loss climbs above so many times its running mean, and above what it was when IRE started, "
            "or is not finite, kappa is halved. 0 turns this off."
        },
    )

    def __post_init__(self):
        self._settle_ire_preset()
        self.check_ire_arguments()
        # The other half of the class is a TrainingArguments, except where these flags stand alone.
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    def _settle_ire_preset(self) -> None:
        """Give the flags that were not given plain values: those of the preset, or their defaults."""
        check_types(self, IREArguments, ["ire_preset"])
        preset = IRE_PRESETS.get(self.ire_preset, {})
        for flag, key in (("ire_kappa", "kappa"), ("ire_gamma", "gamma"), ("ire_start_step", "start")):
            value = getattr(self, flag)
            if isinstance(value, _UnsetNumber):
                setattr(self, flag, preset.get(key, float(value)))
            elif isinstance(value, _UnsetNone):
                setattr(self, flag, preset.get(key))

    def check_ire_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range. Called again as training starts: a sweep sets attributes."""
        check_types(self, IREArguments)
        check_ire_arguments(
            self.ire_kappa,
            self.ire_gamma,
            self.ire_scope,
            self.ire_beta,
            self.ire_mask,
            self.ire_kappa_schedule,
            prefix="ire_",
        )
        if self.ire_interval < 1:
            raise ValueError(f"ire_interval={self.ire_interval}: must be a whole number of steps, at least 1.")
        if not 0 < self.ire_probe_fraction <= 1:
            raise ValueError(f"ire_probe_fraction={self.ire_probe_fraction}: must be in (0, 1].")
        if self.ire_guard != 0 and not 1 < self.ire_guard < math.inf:
            raise ValueError(
                f"ire_guard={self.ire_guard}: must be more than 1, how many times its mean the loss may be, or 0 (off)."
            )
        if self.ire_start_step is not None:
            _check_steps("ire_start_step", self.ire_start_step)

    def get_ire_start_step(self, lr_warmup_steps: int, num_training_steps: int) -> int:
        """How many steps precede the first one of IRE."""
        return _as_steps(self.ire_start_step, lr_warmup_steps, num_training_steps)

    def ire_flags_of_the_optimizer(self) -> list[str]:
        """The flags that were set and that are arguments of `IRE`, kappa apart."""
        trainer_flags = {"ire_kappa", "ire_preset", "ire_interval", "ire_start_step", "ire_probe_fraction", "ire_guard"}
        return self._ire_flags_set(set(IREArguments.__dataclass_fields__) - trainer_flags)

    def ire_flags_without_effect(self) -> list[str]:
        """The flags of IRE that were set and that nothing will come of."""
        if self.ire_kappa == 0:
            idle = set(IREArguments.__dataclass_fields__) - {"ire_kappa"}
        elif self.ire_mask == "uniform":
            idle = {"ire_gamma", "ire_interval", "ire_probe_fraction", "ire_beta", "ire_scope"}
        elif self.ire_mask == "random":
            idle = {"ire_probe_fraction", "ire_beta", "ire_scope"}
        else:
            idle = set()
        return self._ire_flags_set(idle)

    def _ire_flags_set(self, names: set[str]) -> list[str]:
        fields = IREArguments.__dataclass_fields__
        return [name for name in fields if name in names and getattr(self, name) != fields[name].default]


def _check_steps(flag: str, steps: float) -> None:
    if not (math.isfinite(steps) and steps >= 0) or (steps >= 1 and steps != int(steps)):
        raise ValueError(f"{flag}={steps}: give a whole number of steps, or a fraction of all steps below 1.")


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

    gr_r: float = field(
        default=0.1,
        metadata={
            "help": "r, the radius of the perturbation r g1/||g1|| at which the second gradient is taken; > 0. The "
            "paper uses 0.05 and 0.1 for hundreds of epochs; small models and short runs need less."
        },
    )
    gr_lambda: float | None = field(
        default=None,
        metadata={
            "help": "lambda, the degree of regularization: the step uses (1 - lambda/r) g1 + (lambda/r) g2. None means "
            "equal to gr_r, which is SAM; 0 turns gradient regularization off."
        },
    )
    gr_warmup: str = field(
        default="zero",
        metadata={
            "help": "How GR starts. none: at full strength; r: radius and degree grow linearly for T_w steps; lambda: "
            "the degree grows; zero: no GR for T_w steps, full strength afterwards.",
            "choices": list(GR_WARMUPS),
        },
    )
    gr_warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "T_w, in optimizer steps; below 1 it is a fraction of all steps. None means the steps of the "
            "learning-rate warmup (warmup_steps)."
        },
    )
    gr_scope: str = field(
        default="global",
        metadata={
            "help": "Which gradient gives the direction of the perturbation. global: that of the whole optimizer step, "
            "over all micro-batches and processes (the paper); local: each process its own, which saves one "
            "all-reduce; micro: each micro-batch of each process its own (m-sharpness).",
            "choices": list(GR_SCOPES),
        },
    )
    gr_interval: int = field(
        default=1,
        metadata={
            "help": "After the warmup, regularize every k-th step only and take plain steps between: a cost knob, at "
            "about 1 + 1/k passes per step. 1 is the paper."
        },
    )
    gr_on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "A step whose gradient is infinite or NaN is skipped, with a warning. stop: three in a row end the "
            "run with an error; skip: nothing does. For runs with GR or IRE.",
            "choices": list(ON_NONFINITE),
        },
    )
    gr_half_precision_weights: bool = field(
        default=False,
        metadata={
            "help": "Allow trainable weights in bf16 or fp16, in which a perturbation would be lost in the rounding: "
            "the perturbed copy and the second pass are then float32. One process, without --bf16 or --fp16."
        },
    )

    def __post_init__(self):
        self.check_gr_arguments()
        if isinstance(self, TrainingArguments):
            refuse_booleans(self, TrainingArguments)
            refuse_nan(self, TrainingArguments)
            check_types(self, TrainingArguments, TRAINING_LIMITS)
            check_ranges(self, TRAINING_LIMITS)
        super().__post_init__()

    def check_gr_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range. Called again as training starts: a sweep sets attributes."""
        check_types(self, GRArguments)
        if not (math.isfinite(self.gr_r) and self.gr_r > 0):
            raise ValueError(f"gr_r={self.gr_r}: the radius must be > 0. To turn GR off, set gr_lambda=0 instead.")
        if self.gr_lambda is not None and not (math.isfinite(self.gr_lambda) and self.gr_lambda >= 0):
            raise ValueError(
                f"gr_lambda={self.gr_lambda}: the degree must be >= 0 (0 turns GR off), or None for gr_lambda = gr_r."
            )
        self._refuse_absurd_strength()
        if self.gr_interval < 1:
            raise ValueError(f"gr_interval={self.gr_interval}: must be a whole number of steps, at least 1.")
        if self.gr_warmup_steps is not None:
            _check_steps("gr_warmup_steps", self.gr_warmup_steps)

    def _refuse_absurd_strength(self) -> None:
        for flag, value in (("gr_r", self.gr_r), ("gr_lambda", self.gr_degree)):
            if value > MAX_RADIUS:
                raise ValueError(
                    f"{flag}={value}: must be at most {MAX_RADIUS:g}; the paper has 0.05 and 0.1. Lower it."
                )
        if self.gr_degree / self.gr_r > MAX_RATIO:
            raise ValueError(
                f"gr_lambda={self.gr_degree}: must be at most {MAX_RATIO:g} times gr_r={self.gr_r}. Raise gr_r, or "
                "leave gr_lambda out for gr_lambda = gr_r."
            )

    @property
    def gr_degree(self) -> float:
        """lambda as a number: `gr_lambda`, or `gr_r` where it is None."""
        return self.gr_r if self.gr_lambda is None else self.gr_lambda

    @property
    def is_active(self) -> bool:
        """Whether gradient regularization is on."""
        return self.gr_degree != 0

    def describe_method(self) -> str:
        """Optimizer, GR and IRE, and the forward and backward passes of a step in which all of it acts."""
        optimizer = f"optim={getattr(self.optim, 'value', self.optim)}"
        gr, ire, passes = "no GR", "no IRE", 1.0
        if self.is_active:
            gr = f"GR with r={self.gr_r:g}, lambda={self.gr_degree:g}, gr_warmup={self.gr_warmup}"
            passes += 1 / self.gr_interval
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


@dataclass
class GRConfig(GRArguments, TrainingArguments):
    """`transformers.TrainingArguments` plus the flags of `GRArguments`. No default of the parent is changed."""


def require_writable(output_dir: str) -> None:
    """Raise `ValueError` if `output_dir` cannot be made or written to: before the data is loaded, not after."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"output_dir={output_dir!r} cannot be written to ({error}). Choose another folder.") from error
