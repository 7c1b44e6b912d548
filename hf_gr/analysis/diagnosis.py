"""Is gradient regularization harming a run? What its record and its log say, in plain words.

Each rule answers one question with a verdict and a sentence that contains the numbers it rests on. To add a rule, write
a function of a `Run` and give it an entry in `RULES`. It returns None where its question does not arise.
"""

import math
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..optim.gr_warmup import GR_WARMUPS, gr_strength, is_between
from .adaptive_lr import RELIABLE_SAMPLES, adaptive_lr_variation, effective_samples, fit_norm_decay

YES, NO, CANNOT_TELL = "yes", "no", "cannot tell"
#: The second moments count as young during the warmup, and for at least this many steps: from then on the coefficient
#: of variation of Adam's adaptive learning rate is at most 10 % with constant gradients.
YOUNG_STEPS = 50
#: ||g|| falls if its rate is this many standard errors above 0; with fewer norms the error itself is not known.
STANDARD_ERRORS, FEWEST_NORMS = 3, 5
#: The gauge of r: where it counts as linear, and from where on curvature dominates.
LINEAR, CURVED = (0.8, 1.2), 3.0
#: ||g2|| / ||g1|| up to which g2 hardly differs from g1.
SAME_NORM = 1.02
#: The loss has stalled early if it has kept this share. In our runs with wrong labels it did so, far from linear within
#: r, where GR from the first step was too strong.
STALLED = 0.99
#: Adam's rates are unsteady early if they move this many times as fast as late, relative to steady gradients.
UNSTEADY = 2.0
#: The share of the stability threshold from which a run is near the edge.
NEAR_EDGE = 0.8

#: The names of optimizers without and with a second moment.
WITHOUT = re.compile("SGD|LARS|Lion|Muon|Rprop", re.IGNORECASE)
WITH = re.compile("Adam|Adafactor|Adagrad|LAMB|RMSprop", re.IGNORECASE)
MAX_GRAD_NORM = 1.0  # the default of transformers
#: The optimizers whose preconditioned sharpness `gr_diagnostics_steps` measures, every tenth time.
MEASURED = ("Adam", "AdamW", "RMSprop")


class Part(NamedTuple):
    """Steps with the same settings, by the flags' names; None if they were not recorded."""

    first_step: int
    last_step: int
    settings: dict[str, Any] | None


class Finding(NamedTuple):
    """The answer to one question."""

    verdict: str
    sentence: str


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        parts: its steps, in order.
        log: its `log_history`.
        max_steps: the steps that it was meant to have.
        optimizer: the name of its class; `optimizer_settings` are those of its first group.
        regularized_steps: how many were, by count; `skipped_steps` changed nothing, because the gradient was not
            finite.
    """

    parts: Sequence[Part]
    log: Sequence[dict[str, Any]]
    max_steps: int
    optimizer: str = "the optimizer"
    optimizer_settings: dict[str, Any] = field(default_factory=dict)
    regularized_steps: int = 0
    skipped_steps: int = 0

    # ---- Settings ----

    @property
    def last_step(self) -> int:
        """The number of its steps."""
        return max((part.last_step for part in self.parts), default=0)

    @property
    def recorded(self) -> list[tuple[Part, dict[str, Any]]]:
        """The parts whose settings are known."""
        return [(part, part.settings) for part in self.parts if part.settings is not None]

    @property
    def regularized(self) -> list[tuple[Part, dict[str, Any]]]:
        """The parts with GR on."""
        return [(part, settings) for part, settings in self.recorded if settings.get("gr_lambda", 0) != 0]

    @property
    def unknown_warmups(self) -> set[str]:
        """GR warmups that were added from outside of the package."""
        return {settings["gr_warmup"] for _, settings in self.regularized} - GR_WARMUPS.keys()

    def setting(self, name: str, default: Any) -> Any:
        """The value of a setting at the start of the run."""
        return next((settings.get(name, default) for _, settings in self.recorded), default)

    # ---- The beginning ----

    @property
    def warmup_steps(self) -> int:
        """Those of the flag `warmup_steps`, as transformers counts them."""
        given = self.setting("warmup_steps", 0)
        return int(given) if given >= 1 else math.ceil(given * self.max_steps)

    @property
    def young_steps(self) -> int:
        """The steps in which the optimizer's second moments count as young."""
        return min(max(self.warmup_steps, YOUNG_STEPS), self.last_step)

    @property
    def beginning(self) -> str:
        """These steps in words."""
        is_warmup = self.young_steps == self.warmup_steps
        return f"{self.young_steps} warmup steps" if is_warmup else f"first {self.young_steps} steps"

    @property
    def has_known_beginning(self) -> bool:
        """Whether there is a first step, and the settings of all these steps are known."""
        early = [part for part in self.parts if part.first_step <= self.young_steps]
        return bool(early) and all(part.settings is not None for part in early)

    def active_steps(self, last: int) -> dict[int, float]:
        """Step -> lambda_t / lambda, for those up to step `last` with a perturbed gradient by the recorded settings."""
        degrees = {
            step: _degree(settings, step)
            for part, settings in self.regularized
            for step in range(part.first_step, min(part.last_step, last) + 1)
        }
        return {step: degree for step, degree in degrees.items() if degree > 0}

    # ---- The optimizer ----

    @property
    def has_second_moment(self) -> bool | None:
        """Whether the optimizer keeps one; None if that is not known."""
        if WITHOUT.search(self.optimizer):
            return False
        return True if WITH.search(self.optimizer) or self.beta2 is not None else None

    @property
    def beta2(self) -> float | None:
        """The decay rate of its second moment; None without one, and if it is not known."""
        if WITHOUT.search(self.optimizer):
            return None
        betas, alpha = (self.optimizer_settings.get(name) for name in ("betas", "alpha"))
        found = alpha if betas is None else betas[1]
        return found if isinstance(found, float) and 0 < found < 1 else None

    # ---- The log ----

    def logged(self, key: str, first: float = 1, last: float = math.inf) -> dict[int, float]:
        """Step -> value, of the finite values logged from step `first` to `last`."""
        entries = (entry for entry in self.log if key in entry and first <= entry["step"] <= last)
        return {entry["step"]: entry[key] for entry in entries if math.isfinite(entry[key])}

    @property
    def rerun(self) -> str:
        """How to log what the later rules need."""
        return f"Rerun with --gr_diagnostics_steps {min(10, self.last_step // 20 + 1)}."

    def ratios(self, key: str, to: str, first: float = 1) -> dict[int, float]:
        """Step -> ratio of two positive logged values."""
        above, below = self.logged(key, first), self.logged(to, first)
        return {step: above[step] / below[step] for step in above if below.get(step, 0) > 0}


def diagnose(run: Run) -> list[Finding]:
    """The findings of all rules whose question arises."""
    findings = (rule(run) for rule in RULES)
    return [finding for finding in findings if finding is not None]


def _degree(settings: dict[str, Any], step: int) -> float:
    """lambda_t / lambda at a step, counted from 1; also 1 in a step that is perturbed along the momentum."""
    warmup_steps, interval = int(settings.get("gr_warmup_steps", 0)), settings.get("gr_interval", 1)
    if settings.get("gr_momentum_r", 0) != 0 and is_between(step - 1, warmup_steps, interval):
        return 1.0
    strength = gr_strength(
        step - 1,
        r=settings["gr_r"],
        lambda_=settings["gr_lambda"],
        warmup=settings["gr_warmup"],
        warmup_steps=warmup_steps,
        interval=interval,
    )
    return strength.lambda_t / settings["gr_lambda"] if strength.is_active else 0.0


# ---- Rules ----


def was_active_early(run: Run) -> Finding:
    """Was GR active while the optimizer's second moments were young?"""
    if not run.has_known_beginning:
        return Finding(
            CANNOT_TELL,
            "Whether GR was active early: the settings of the first steps are not in run.json. Run again from the "
            "start with GRTrainer.",
        )
    steps = sum(part.last_step - part.first_step + 1 for part, _ in run.recorded)
    if not run.regularized:
        return Finding(NO, f"GR was off (gr_lambda = 0) in all {steps} recorded steps.")
    if run.unknown_warmups:
        names = ", ".join(sorted(run.unknown_warmups))
        return Finding(CANNOT_TELL, f"Whether GR was active early: gr_warmup={names} is not one of hf_gr's.")
    active = run.active_steps(run.young_steps)
    if not active:
        later = run.active_steps(run.last_step)
        when = f"from step {min(later)} on, in {run.regularized_steps} of {steps} steps" if later else "in no step"
        return Finding(NO, f"GR was not active early: in 0 of the {run.beginning}. It acted {when}.")
    entries = [step for step in run.logged("grad_norm") if step in active]
    degrees = run.logged("gr_lambda")
    if entries and not any(degrees.get(step, 0) for step in entries):
        return Finding(
            CANNOT_TELL,
            f"Whether GR was active early: the flags say so for {len(active)} of the {run.beginning}, but none of the "
            f"{len(entries)} log entries there has a gr_lambda. Look for code that changes it.",
        )
    strength = statistics.fmean(active.values())
    at = "at full strength" if strength == 1 else f"on average at {strength:.0%} of its full strength"
    meaning = {
        True: f"while the second moments of {run.optimizer} were young",
        False: f"and {run.optimizer} keeps no second moments that this could disturb",
        None: f"and whether {run.optimizer} keeps second moments is not known",
    }[run.has_second_moment]
    return Finding(YES, f"GR was active early, in {len(active)} of the {run.beginning}, {at}, {meaning}.")


def did_the_norm_fall(run: Run) -> Finding | None:
    """Did ||g|| fall early, and what does that do to the adaptive learning rate?"""
    if run.last_step < FEWEST_NORMS:
        return None
    norms = {step: norm for step, norm in run.logged("grad_norm", last=run.young_steps).items() if norm > 0}
    if len(norms) < FEWEST_NORMS:
        every = math.ceil(run.young_steps / (2 * FEWEST_NORMS))
        return Finding(
            CANNOT_TELL,
            f"Whether ||g|| fell: it is logged in {len(norms)} of the {run.beginning}, and {FEWEST_NORMS} are needed. "
            f"Rerun with --logging_steps {every}.",
        )
    rate, error = _norm_decay(norms)
    fell, rose = rate > STANDARD_ERRORS * error, rate < -STANDARD_ERRORS * error
    trend = "fell" if fell else "rose" if rose else "neither fell nor rose significantly"
    first, *_, last = norms.values()
    return Finding(
        YES if fell else NO,
        f"||g|| {trend}, from {first:.3g} to {last:.3g} in the {run.beginning}: gamma = {rate:.2g} per step, standard "
        f"error {error:.2g}, from {len(norms)} logged norms.{_effect_on_rates(run, norms)}",
    )


def _norm_decay(norms: dict[int, float]) -> tuple[float, float]:
    estimate = fit_norm_decay([{"step": step, "grad_norm": norm} for step, norm in norms.items()])
    return estimate.value, estimate.standard_error


def _effect_on_rates(run: Run, norms: dict[int, float]) -> str:
    """What gamma does to psi, for the norms that the optimizer gets, after clipping."""
    if run.has_second_moment is False:
        return f" {run.optimizer} keeps no second moments that this could disturb."
    if run.beta2 is None:
        return ""
    limit = run.setting("max_grad_norm", MAX_GRAD_NORM) or math.inf
    clipped = sum(norm > limit for norm in norms.values())
    gamma, _ = _norm_decay({step: min(norm, limit) for step, norm in norms.items()})
    subject, clipping = f"the adaptive learning rate of {run.optimizer}", ""
    if clipped:
        subject = "its adaptive learning rate"
        clipping = f"{run.optimizer} gets gamma = {round(gamma, 6) + 0.0:.2g}, as {clipped} of them were clipped to "
        clipping += f"{limit:g}. "
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sentence says so
        variation, steady = (adaptive_lr_variation(run.young_steps, rate, run.beta2) for rate in (gamma, 0.0))
    at_least = "at least " if effective_samples(run.young_steps, gamma, run.beta2) < RELIABLE_SAMPLES else ""
    return (
        f" {clipping}By Eq. 9 {subject} then varies by {at_least}{variation:.1%} of its mean, against {steady:.1%} "
        "with constant gradients."
    )


def is_r_in_the_band(run: Run) -> Finding | None:
    """Does the loss rise within r about as much as a linear loss would?"""
    if not run.regularized:
        return None
    start = run.last_step // 4 + 1
    gauge = run.logged("gr_linearity", start)
    if not gauge:
        takes_one_pass = all(settings.get("gr_ascent") == "momentum" for _, settings in run.regularized)
        why = "a step of one pass measures no rise of the loss" if takes_one_pass else "gr_linearity is not logged"
        return Finding(CANNOT_TELL, f"Whether r is too large: {why}. Compare several gr_r on held-out data.")
    level = statistics.median(gauge.values())
    seen = f"within r the loss rises {level:.2f} times as much as a linear loss would (gr_linearity, the median of "
    seen += f"{len(gauge)} log entries after the first quarter)"
    if level > CURVED:
        return Finding(NO, f"Curvature dominates: {seen}. r may be too large. Compare with half of gr_r.")
    if not LINEAR[0] <= level <= LINEAR[1]:
        return Finding(
            NO, f"r is outside of the linear band: {seen}. Good and failed runs show this. Compare with half of gr_r."
        )
    norms = run.ratios("gr_perturbed_grad_norm", "gr_grad_norm", start)
    ratio = statistics.median(norms.values()) if norms else math.nan
    if 1 / SAME_NORM <= ratio <= SAME_NORM:
        return Finding(YES, f"r is small, perhaps too small to matter: {seen}, and ||g2|| is {ratio:.2f} ||g1||.")
    return Finding(YES, f"r is in the linear band: {seen}. Good and failed runs show this as well.")


def did_the_rates_move_early(run: Run) -> Finding | None:
    """Did the adaptive learning rates move faster early than late, as the paper's explanation of the harm has it?"""
    early = _pace(run, first=2, last=run.young_steps)
    late = _pace(run, first=max(run.young_steps, run.last_step // 2) + 1, last=run.last_step)
    if run.beta2 is None or not (early or run.active_steps(run.young_steps)):
        return None
    rates = f"the adaptive learning rates of {run.optimizer}"
    if not early or not late:
        return Finding(
            CANNOT_TELL,
            f"Whether {rates} moved fast early: adaptive_lr_change is not logged both early and late. {run.rerun}",
        )
    factor = statistics.median(early) / statistics.median(late)
    seen = f"relative to steady gradients, {rates} moved {factor:.2g} times as fast in the {run.beginning} as in the "
    seen += f"last half ({len(early)} and {len(late)} log entries)"
    if factor > UNSTEADY:
        return Finding(YES, f"The second moments were unsteady early: {seen}. This alone does not show harm.")
    return Finding(NO, f"The second moments were not unsteady early: {seen}.")


def would_zero_warmup_matter(run: Run) -> Finding | None:
    """Would zero-warmup have changed anything?"""
    if not run.regularized or was_active_early(run).verdict == CANNOT_TELL:
        return None
    if not run.active_steps(run.young_steps):
        return Finding(NO, f"Zero-warmup would have changed nothing: 0 of the {run.beginning} had GR.")
    losses, gauge = (list(run.logged(key, last=run.young_steps).values()) for key in ("loss", "gr_linearity"))
    compare = f"Compare with --gr_warmup zero --gr_warmup_steps {run.young_steps}, over several seeds."
    if len(losses) < 2 or not gauge:
        return Finding(
            CANNOT_TELL,
            f"Whether zero-warmup would have helped: the {run.beginning} have {len(losses)} log entries with a loss "
            f"and {len(gauge)} with gr_linearity. {compare}",
        )
    level = statistics.median(gauge)
    seen = f"with GR, the loss went from {losses[0]:.4g} to {losses[-1]:.4g} in the {run.beginning}, and rose within r "
    seen += f"{level:.2f} times as much as a linear loss would"
    if losses[-1] > STALLED * losses[0] and level < LINEAR[0]:
        return Finding(YES, f"Zero-warmup would probably have changed the start: {seen}. How much lasts? {compare}")
    return Finding(CANNOT_TELL, f"Whether zero-warmup would have helped: {seen}, which is no clear sign. {compare}")


def _pace(run: Run, first: int, last: int) -> list[float]:
    """How fast log psi moved at the logged steps t > 1, relative to independent gradients of constant variance: then
    the latest of them has the weight w = (1 - beta2) / (1 - beta2^t), and log psi moves by about w / sqrt(2)."""
    beta2 = run.beta2
    if beta2 is None:
        return []
    changes = run.logged("adaptive_lr_change", first, last)
    return [change * math.sqrt(2) * (1 - beta2**t) / (1 - beta2) for t, change in changes.items()]


def is_near_the_edge(run: Run) -> Finding | None:
    """Is the run near the edge of stability?"""
    ratios = run.ratios("preconditioned_sharpness", "stability_threshold")
    if not ratios:
        if run.optimizer not in MEASURED or any(settings.get("ire_kappa", 0) for _, settings in run.recorded):
            return None
        return Finding(
            CANNOT_TELL, f"How near the edge of stability: preconditioned_sharpness is not logged. {run.rerun}"
        )
    highest = max(ratios, key=lambda step: ratios[step])
    seen = f"the preconditioned sharpness is at most {ratios[highest]:.2g} of the stability threshold (step {highest}; "
    seen += f"{len(ratios)} log entries)"
    if ratios[highest] < NEAR_EDGE:
        return Finding(NO, f"The run stayed away from the edge of stability: {seen}.")
    near = sum(ratio >= NEAR_EDGE for ratio in ratios.values())
    return Finding(YES, f"The run was near the edge of stability: {seen}; {near} of them reach {NEAR_EDGE:g}.")


def were_steps_skipped(run: Run) -> Finding | None:
    """Did some steps change nothing?"""
    if run.skipped_steps == 0:
        return None
    return Finding(
        YES,
        f"Steps were skipped: {run.skipped_steps} of {run.last_step} changed nothing, because the gradient was not "
        "finite. The counts above include them.",
    )


RULES: tuple[Callable[[Run], Finding | None], ...] = (
    was_active_early,
    did_the_norm_fall,
    did_the_rates_move_early,
    is_r_in_the_band,
    would_zero_warmup_matter,
    is_near_the_edge,
    were_steps_skipped,
)
