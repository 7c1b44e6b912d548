"""Training of causal language models: perplexity in the log, budgets in tokens, samples of text."""

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .full_evaluation import FullEvaluation
from .trainer import GRTrainer


class CausalLMTrainer(FullEvaluation, GRTrainer):
    """`GRTrainer` with `eval_perplexity` beside `eval_loss`, on every evaluation example."""

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, *args, **kwargs)

    def add_to_last_evaluation(self, metrics: dict[str, float]) -> None:
        """Put further results beside the last ones in the log, where the model card finds them."""
        index = max(i for i, entry in enumerate(self.state.log_history) if "eval_loss" in entry)
        self.state.log_history[index].update(metrics)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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
