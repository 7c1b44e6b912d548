"""What a run has cost, for a fair comparison of two: seconds, passes, tokens and memory, estimates and second passes
included."""

import sys
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from .recording import Recorder


class CostMixin:
    """Counts what a run does, and keeps it in `run.json`. Part of `GRMixin`.

    Logged with the losses: `train_seconds`, evaluations not counted, and `train_passes`, the forward and backward
    passes over a step's batch so far, with those of GR and of IRE's estimates. The log of an evaluation has them too,
    and `evaluated_examples`; its metrics, which a hyperparameter search optimizes, have not. A run that is resumed goes
    on counting from what its checkpoint has.
    """

    def __init__(self, *args, **kwargs):
        #: Dataclasses with further arguments of the run, recorded like those of the trainer. A `dataset_name` among
        #: them says what the run trains on.
        self.script_args: tuple[Any, ...] = ()
        super().__init__(*args, **kwargs)
        self._evaluated_examples = 0
        self.recorder = Recorder(self)
        self.add_callback(self.recorder)

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        self.recorder.resumed_from = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.recorder.finish()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Tensor:
        """As in `Trainer`; each call is a forward and backward pass over its share of the step's batch."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.recorder.segment.passes += 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        return loss

    # ---- Evaluations ----

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The evaluations during training, also those of a subclass whose `evaluate` is all its own."""
        with self.recorder.clock_stopped():
            return super()._evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        self._evaluated_examples = 0
        with self.recorder.clock_stopped():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        """As in `Trainer`; the examples are counted, without those that only fill up the last batch."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        state = self.accelerator.gradient_state
        rows = (find_batch_size(inputs) or 0) * self.args.world_size
        is_filled_up = state.end_of_dataloader and 0 < state.remainder < rows
        self._evaluated_examples += state.remainder if is_filled_up else rows
        return result

    # ---- The log ----

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the costs so far."""
        if "loss" in logs:
            logs |= self._costs_so_far()
        if not any(key.startswith("eval_") for key in logs):
            return super().log(logs, *args, **kwargs)
        # `logs` are the metrics that `evaluate` returns, and get from `Trainer` what they always get.
        own = self._costs_so_far()
        if self._evaluated_examples:
            own["evaluated_examples"] = self._evaluated_examples
        self._evaluated_examples = 0
        entry = {**logs, **own}
        super().log(entry, *args, **kwargs)
        logs.update({key: value for key, value in entry.items() if key not in own})
        return None

    def _costs_so_far(self) -> dict[str, float]:
        return {"train_seconds": self.train_seconds, "train_passes": self.train_passes}

    @property
    def train_seconds(self) -> float:
        """Since the beginning of the run, evaluations not counted."""
        return self.recorder.seconds

    @property
    def train_passes(self) -> float:
        """Forward and backward passes over the batch of a step, in all steps so far."""
        return self.recorder.passes

    def costs(self) -> dict[str, float]:
        """What training has cost: seconds, passes, the peak of memory in bytes, and tokens if they were counted."""
        costs = {**self._costs_so_far(), "peak_memory_bytes": peak_memory(self.args.device)}
        if self.args.include_num_input_tokens_seen != "no":
            costs["train_tokens"] = self.state.num_input_tokens_seen
        return costs

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`; the record comes first, so that a checkpoint that is whole has it."""
        folder = self._get_output_dir(trial=trial)
        self.recorder.write(folder, f"{folder}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        super()._save_checkpoint(model, trial)


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
