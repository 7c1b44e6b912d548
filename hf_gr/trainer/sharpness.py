"""How sharp a trainer's loss is at its weights: `hf_gr.analysis.curvature` on its own batches and `compute_loss`."""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, cast

from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..analysis.curvature import QUANTITIES, check_quantities, measure
from ..analysis.estimates import Estimate
from ..optim.pass_state import RNGState
from .part import Host, log_entry
from .replay import attributes_set_aside


def measure_sharpness(
    trainer: Host,
    batches: Sequence[Any],
    quantities: Sequence[str] = tuple(QUANTITIES),
    method: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Estimate]:
    """Each of `quantities` of the trainer's loss on `batches`, those of this process. All processes call it.

    Args:
        batches: as in `FixedBatches`.
        method: of products of the Hessian; see `GRMixin.sharpness`.
        options: further arguments of the functions in `QUANTITIES`, by its keys.
    """
    model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
    if method is None and trainer.is_fsdp_enabled:
        method = "difference"

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        return cast(Tensor, trainer.compute_loss(model, copy.copy(batch)))  # label smoothing takes the labels out

    def mean(tensor: Tensor) -> Tensor:
        return tensor if hasattr(tensor, "full_tensor") else trainer.accelerator.reduce(tensor, "mean")

    with trainer.recorder.clock_stopped(), in_float32(model), _uncounted(trainer):
        return measure(model, loss_of, batches, quantities, method, options, mean)


@contextmanager
def _uncounted(trainer: Host) -> Iterator[None]:
    """Within, `compute_loss` counts nothing of what it counts in a first pass."""
    trainer.gr_second_pass = True
    try:
        with attributes_set_aside(trainer, trainer.gr_first_pass_only):
            yield
    finally:
        trainer.gr_second_pass = False


def recorded_sharpness(
    trainer: Host,
    fixed: "FixedBatches",
    quantities: Sequence[str],
    method: str | None,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Estimate]:
    """`measure_sharpness`, kept in the run's record."""
    found = measure_sharpness(trainer, fixed.batches, quantities, method, options)
    trainer.recorder.keep_sharpness(
        data=fixed.data,
        batches=len(fixed.batches) * trainer.accelerator.num_processes,
        batch_size=find_batch_size(fixed.batches[0]),
        results={name: asdict(estimate) for name, estimate in found.items()},
        options={name: _recordable(name, options.get(name, {})) for name in found},
    )
    return found


def _recordable(quantity: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a quantity's function, those that `SharpnessFacts.options` has."""
    defaults = {p.name: p.default for p in inspect.signature(QUANTITIES[quantity]).parameters.values()}
    arguments = {**defaults, **options}
    if "preconditioner" in arguments:
        arguments["preconditioner"] = arguments["preconditioner"] is not None
    scalars = {name: value.item() if hasattr(value, "item") else value for name, value in arguments.items()}
    return {name: value for name, value in scalars.items() if isinstance(value, bool | int | float)}


@dataclass(frozen=True)
class FixedBatches:
    """The first batches of a dataset, in its own order.

    Attributes:
        batches: this process's share.
        data: where they are from, as `SharpnessFacts.data` says it.
    """

    batches: list[Any]
    data: str

    @classmethod
    def of(cls, trainer: Host, count: int, dataset: Any = None) -> "FixedBatches":
        """The first `count` of `dataset`; see `GRMixin.sharpness`."""
        data, dataset = _named(trainer, dataset)
        return cls(_first_batches(trainer, count, dataset), data)


def _named(trainer: Host, dataset: Any) -> tuple[str, Any]:
    """(`SharpnessFacts.data`, dataset) of a dataset, the name of one, or None."""
    train, evaluation = trainer.train_dataset, cast(Any, trainer.eval_dataset)
    if dataset is None:
        dataset = evaluation if train is None else train
    if isinstance(dataset, str):
        return f"eval_{dataset}", evaluation[dataset]
    if dataset is None or isinstance(dataset, dict):
        raise ValueError("dataset: there is none, or several. Give the one to measure on.")
    several = evaluation if isinstance(evaluation, dict) else {}
    known = {"train": train, "eval": evaluation, **{f"eval_{name}": value for name, value in several.items()}}
    return next((name for name, value in known.items() if value is dataset), "other"), dataset


def _first_batches(trainer: Host, count: int, dataset: Any) -> list[Any]:
    """A dataset that draws at random, such as one of augmented images, gives the same at every call, and the run's
    random generators stay as they are."""
    if count < 1:
        raise ValueError(f"batches={count}: give at least 1.")
    share = math.ceil(count / trainer.accelerator.num_processes)
    before = RNGState.capture(trainer.args.device)
    try:
        set_seed(trainer.args.seed)
        loader = trainer.get_test_dataloader(dataset)
        batches = [trainer._prepare_inputs(batch) for batch in islice(loader, share)]
        if hasattr(loader, "end"):  # or accelerate would believe that it is still in use
            loader.end()
    finally:
        before.restore()
    return batches


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within, without the autocast that accelerate puts around the forward pass: a rise of the loss by less than one
    part in a hundred is lost in bfloat16."""
    original, cast = vars(model).get("_original_forward"), vars(model).get("forward")
    if original is None or cast is None:
        yield
        return
    vars(model)["forward"] = original
    try:
        yield
    finally:
        vars(model)["forward"] = cast


def as_logs(found: Mapping[str, Estimate]) -> dict[str, float]:
    """`sharpness_NAME`, and `sharpness_NAME_error` of those that have one."""
    logs = {}
    for name, estimate in found.items():
        logs[f"sharpness_{name}"] = estimate.value
        if estimate.standard_error != 0:
            logs[f"sharpness_{name}_error"] = estimate.standard_error
    return logs


class SharpnessCallback(TrainerCallback):
    """Logs `trainer.sharpness(...)` during training, at evaluations or every so many steps, as `sharpness_sam`,
    `sharpness_trace` and so on, with the standard error as `sharpness_trace_error`. The run is not affected.

        trainer.add_callback(SharpnessCallback(trainer, every=100, quantities=("sam", "top")))

    All batches stay in memory.

    Args:
        trainer: the trainer.
        every: optimizer steps between measurements; None measures at each evaluation.
        batches: as for `trainer.sharpness`, like all that follow.
        quantities: which of them.
        dataset: what to measure on.
        method: how products of the Hessian are computed.
        options: further arguments of one of the quantities, by its name.
    """

    def __init__(
        self,
        trainer: Any,
        every: int | None = None,
        batches: int = 8,
        quantities: Sequence[str] = tuple(QUANTITIES),
        dataset: Any = None,
        method: str | None = None,
        **options: Mapping[str, Any],
    ):
        if every is not None and every < 1:
            raise ValueError(f"every={every}: give at least 1 step, or None to measure at each evaluation.")
        check_quantities(quantities, options)
        self.every = every
        self._trainer, self._count, self._dataset = trainer, batches, dataset
        self._quantities, self._method, self._options = tuple(quantities), method, options
        self._batches: FixedBatches | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._log(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every is None:
            self._log(control)

    def _log(self, control: TrainerControl) -> None:
        trainer = self._trainer
        if self._batches is None:
            self._batches = FixedBatches.of(trainer, self._count, self._dataset)
        found = recorded_sharpness(trainer, self._batches, self._quantities, self._method, self._options)
        log_entry(trainer, control, as_logs(found))
