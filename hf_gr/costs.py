"""What a run has cost, for a fair comparison of two: seconds, passes, tokens and memory, estimates and second passes
included."""

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments


class CostMixin:
    """Logs with the losses `train_seconds`, evaluations not counted, and `train_passes`, the forward and backward
    passes over a step's batch so far, with those of GR and of IRE's estimates. Part of `GRMixin`.

    A run that is resumed goes on counting from what its checkpoint has logged.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._train_seconds = 0.0
        self._running_since: float | None = None
        #: The first steps of a run that was resumed without a log of them: nobody knows what they took.
        self.untimed_steps = 0
        self.add_callback(_SecondsBeforeResume(self))

    def train(self, *args, **kwargs):
        self._train_seconds, self._running_since = 0.0, time.perf_counter()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._stop_clock()

    def _stop_clock(self) -> bool:
        """Whether it was running."""
        if self._running_since is None:
            return False
        self._train_seconds += time.perf_counter() - self._running_since
        self._running_since = None
        return True

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        was_running = self._stop_clock()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if was_running:
                self._running_since = time.perf_counter()

    @property
    def train_seconds(self) -> float:
        """Since the beginning of the run, evaluations not counted."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._train_seconds + running

    @property
    def train_passes(self) -> float:
        """Forward and backward passes over the batch of a step, in all steps so far."""
        steps = self.state.global_step
        passes = steps + self.gr_regularized_steps(steps)
        ire = self.ire_optimizer
        estimates = ire.updates if ire is not None and ire.needs_estimate else 0
        return passes + estimates * self.gr_args.ire_probe_fraction

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the costs so far."""
        if "loss" in logs or any(key.startswith("eval_") for key in logs):
            logs["train_seconds"] = self.train_seconds
            logs["train_passes"] = self.train_passes
        super().log(logs, *args, **kwargs)

    def costs(self) -> dict[str, float]:
        """What training has cost: seconds, passes, the peak of memory in bytes, and tokens if they were counted."""
        costs = {
            "train_seconds": self.train_seconds,
            "train_passes": self.train_passes,
            "peak_memory_bytes": peak_memory(self.args.device),
        }
        if self.args.include_num_input_tokens_seen != "no":
            costs["train_tokens"] = self.state.num_input_tokens_seen
        return costs


class _SecondsBeforeResume(TrainerCallback):
    """Adds what the log of the checkpoint has, which is known only when `Trainer` has read it."""

    def __init__(self, trainer: CostMixin):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        logged = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self._trainer._train_seconds += logged[-1] if logged else 0.0
        self._trainer.untimed_steps = 0 if logged else state.global_step


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
