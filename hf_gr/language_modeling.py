"""Training of causal language models: perplexity and cost in the log, budgets in tokens, samples of text."""

import math
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from .trainer import GRTrainer


class CausalLMTrainer(GRTrainer):
    """`GRTrainer` with `eval_perplexity` beside `eval_loss`, and with what a fair comparison of two runs needs.

    Logged with the losses: `train_seconds`, evaluations not counted, and `train_passes`, the forward and
    backward passes over a step's batch so far, with those of GR and of IRE's estimates. A run that is resumed goes on
    counting from what its checkpoint has logged.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._train_seconds = 0.0
        self._running_since: float | None = None
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
    def train_passes(self) -> float:
        """Forward and backward passes over the batch of a step, in all steps so far."""
        steps = self.state.global_step
        passes = steps + self.gr_regularized_steps(steps)
        ire = self.ire_optimizer
        estimates = ire.updates if ire is not None and ire.needs_estimate else 0
        return passes + estimates * self.gr_args.ire_probe_fraction

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        if "loss" in logs or "eval_loss" in logs:
            running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
            logs["train_seconds"] = self._train_seconds + running
            logs["train_passes"] = self.train_passes
        super().log(logs, *args, **kwargs)

    def add_to_last_evaluation(self, metrics: dict[str, float]) -> None:
        """Put further results beside the last ones in the log, where the model card finds them."""
        index = max(i for i, entry in enumerate(self.state.log_history) if "eval_loss" in entry)
        self.state.log_history[index].update(metrics)

    def costs(self) -> dict[str, float]:
        """What training has cost: tokens, seconds, passes, and the peak of memory in bytes."""
        return {
            "train_tokens": self.state.num_input_tokens_seen,
            "train_seconds": self._train_seconds,
            "train_passes": self.train_passes,
            "peak_memory_bytes": peak_memory(self.args.device),
        }


class _SecondsBeforeResume(TrainerCallback):
    """Adds what the log of the checkpoint has, which is known only when `Trainer` has read it."""

    def __init__(self, trainer: CausalLMTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        logged = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self._trainer._train_seconds += logged[-1] if logged else 0.0


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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


def steps_for_tokens(max_train_tokens: int, args: TrainingArguments, block_size: int) -> int:
    """The optimizer steps that see at least `max_train_tokens` tokens."""
    if max_train_tokens < 1:
        raise ValueError(f"max_train_tokens={max_train_tokens}: give at least 1, or leave it out.")
    if args.max_steps > 0:
        raise ValueError(
            f"max_train_tokens={max_train_tokens} and max_steps={args.max_steps} both say how long to train. Leave one "
            "of them out."
        )
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size
    return math.ceil(max_train_tokens / per_step)


@torch.no_grad()
def generate_text(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 60,
    seed: int | None = None,
    **kwargs: Any,
) -> str:
    """What `model` writes after `prompt`: greedily, or sampled if a seed is given. Leaves the random state alone."""
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompt or tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").to(model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=seed is not None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **kwargs,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed)
            ids = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
            )
    finally:
        model.train(was_training)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
