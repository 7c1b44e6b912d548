"""What a run costs, for fair comparisons: seconds, passes (second passes and estimates included), tokens, memory."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

from ..reporting.record import EVALUATIONS
from .part import Host, Part
from .recording import Recorder


class Costs(Part):
    """Counts and logs the costs of a run; the record stores them.

    A resumed run continues from the counts in its checkpoint.
    """

    def __init__(self, trainer: Host, recorder: Recorder):
        super().__init__(trainer)
        self._recorder = recorder
        self._evaluated_examples = 0

    def check(self) -> None:
        self._trainer.add_callback(self._recorder)

    def counted(self, one_pass: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`one_pass`, a forward and backward pass over a micro-batch, counted as its share of the step's batch."""

        def counted_pass(*args: Any) -> Tensor:
            loss = one_pass(*args)
            self._recorder.segment.passes += 1 / self._trainer.current_gradient_accumulation_steps
            return loss

        return counted_pass

    # ---- Evaluations ----

    def count_examples(self, inputs: dict[str, Any]) -> None:
        """Count the examples of one evaluation step, without those that only pad the last batch."""
        state = self._trainer.accelerator.gradient_state
        rows = (find_batch_size(inputs) or 0) * self._trainer.args.world_size
        is_padded = state.end_of_dataloader and 0 < state.remainder < rows
        self._evaluated_examples += state.remainder if is_padded else rows

    @contextmanager
    def during_evaluation(self) -> Iterator[None]:
        """Stop the clock and count the evaluated examples from 0."""
        self._evaluated_examples = 0
        with self._recorder.clock_stopped():
            yield

    # ---- The log ----

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        return self.so_far()

    @contextmanager
    def entry(self, logs: dict[str, float]) -> Iterator[dict[str, float]]:
        """The log entry for `logs`. That of an evaluation also has the costs and the number of examples; the metrics
        themselves, which a hyperparameter search optimizes, do not."""
        if not any(key.startswith(EVALUATIONS) for key in logs):
            yield logs
            return
        # `logs` is the dict that `evaluate` returns: it still gets what `Trainer` adds to it.
        costs = self.so_far()
        if self._evaluated_examples:
            costs["evaluated_examples"] = self._evaluated_examples
        self._evaluated_examples = 0
        entry = {**logs, **costs}
        yield entry
        logs.update({key: value for key, value in entry.items() if key not in costs})

    def so_far(self) -> dict[str, float]:
        """Seconds of training, excluding evaluation, and passes over the batch of a step."""
        return {"train_seconds": self._recorder.seconds, "train_passes": self._recorder.passes}

    def planned(self) -> list[float]:
        """The passes of each step, by the schedules of GR and IRE."""
        trainer = self._trainer
        return [trainer.gr.passes(step) + trainer.ire.passes(step) for step in range(trainer.state.max_steps)]

    def total(self) -> dict[str, float]:
        """Seconds, passes, peak memory in bytes, and tokens if they were counted."""
        trainer = self._trainer
        costs = {**self.so_far(), "peak_memory_bytes": peak_memory(trainer.args.device)}
        if trainer.args.include_num_input_tokens_seen != "no":
            costs["train_tokens"] = trainer.state.num_input_tokens_seen
        return costs


def peak_memory(device: torch.device) -> int:
    """In bytes: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
