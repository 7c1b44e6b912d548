"""Every flag of the project: its name, help, default and validation."""

import math
import os
import tempfile
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .gr_warmup import GR_WARMUPS, GRStrength, gr_strength

GR_SCOPES = ("global", "local", "micro")


@dataclass
class GRArguments:
    """The flags of gradient regularization, to be put in front of any `TrainingArguments`:

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

    def __post_init__(self):
        self.check_gr_arguments()
        # The other half of the class is a TrainingArguments, except where these flags stand alone.
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    def check_gr_arguments(self) -> None:
        """Raise `ValueError` for a flag out of its range. Called again as training starts: a sweep sets attributes."""
        if not (math.isfinite(self.gr_r) and self.gr_r > 0):
            raise ValueError(f"gr_r={self.gr_r}: the radius must be > 0. To turn GR off, set gr_lambda=0 instead.")
        if self.gr_lambda is not None and not (math.isfinite(self.gr_lambda) and self.gr_lambda >= 0):
            raise ValueError(
                f"gr_lambda={self.gr_lambda}: the degree must be >= 0 (0 turns GR off), or None for gr_lambda = gr_r."
            )
        if self.gr_warmup not in GR_WARMUPS:
            raise ValueError(f"gr_warmup={self.gr_warmup!r}: choose one of {', '.join(GR_WARMUPS)}.")
        if self.gr_scope not in GR_SCOPES:
            raise ValueError(f"gr_scope={self.gr_scope!r}: choose one of {', '.join(GR_SCOPES)}.")
        if self.gr_interval != int(self.gr_interval) or self.gr_interval < 1:
            raise ValueError(f"gr_interval={self.gr_interval}: must be a whole number of steps, at least 1.")
        if self.gr_warmup_steps is not None:
            steps = self.gr_warmup_steps
            if not (math.isfinite(steps) and steps >= 0) or (steps >= 1 and steps != int(steps)):
                raise ValueError(
                    f"gr_warmup_steps={steps}: give a whole number of steps, or a fraction of all steps below 1."
                )
            if self.gr_warmup == "none" and steps > 0:
                raise ValueError(
                    f"gr_warmup_steps={steps} has no effect with gr_warmup='none': leave it out, or choose a warmup "
                    "(r, lambda, zero)."
                )

    @property
    def gr_degree(self) -> float:
        """lambda as a number: `gr_lambda`, or `gr_r` where it is None."""
        return self.gr_r if self.gr_lambda is None else self.gr_lambda

    def get_gr_warmup_steps(self, lr_warmup_steps: int, num_training_steps: int) -> int:
        """T_w in optimizer steps, rounded up as `TrainingArguments.get_warmup_steps` does."""
        if self.gr_warmup_steps is None:
            return lr_warmup_steps
        if self.gr_warmup_steps < 1:
            return math.ceil(self.gr_warmup_steps * num_training_steps)
        return int(self.gr_warmup_steps)

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
