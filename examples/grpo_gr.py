"""Reinforcement learning with a verifiable reward, and gradient regularization in the place of the KL penalty.

    python examples/grpo_gr.py                                            # GRPO with GR
    python examples/grpo_gr.py --gr_lambda 0 --output_dir out/none        # GRPO alone
    python examples/grpo_gr.py --gr_lambda 0 --beta 0.1 --output_dir out/kl
    python examples/grpo_gr.py --hackable 1.5                             # with a reward that can be exploited

A small Llama, made on the spot, learns from examples to sort digits, but not well. GRPO improves it: the reward is the
share of digits in their right places. `--hackable` adds a bonus for nines, whether they are right or not. The settings
are those of "Gradient Regularization Prevents Reward Hacking in Reinforcement Learning from Human Feedback and
Verifiable Rewards" (arXiv 2602.18037): radius r ||g1||, and both gradients clipped at 10.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from hf_gr import GRArguments, GRMixin

LENGTH, DIGITS = 4, 10
WORDS = ("<pad>", "<eos>", "=", *map(str, range(DIGITS)))


@dataclass
class Arguments:
    """The task, and how well it is learned before."""

    supervised_steps: int = field(default=80, metadata={"help": "Steps of supervised learning before GRPO."})
    hackable: float = field(default=0.0, metadata={"help": "Weight of the bonus for nines. 0 is the true reward."})


@dataclass
class Config(GRArguments, GRPOConfig):
    """`GRPOConfig` and the flags of hf_gr, with defaults for the small model."""

    output_dir: str | None = "outputs/grpo-gr"
    max_steps: int = 100
    per_device_train_batch_size: int = 64
    num_generations: int = 8
    max_completion_length: int = LENGTH + 2
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "constant"
    gr_radius_rule: str = "gradient"
    gr_r: float = 1e-3
    gr_lambda: float | None = 1e-3
    gr_clip: float = 10.0
    gr_warmup: str = "none"
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool | None = False
    gradient_checkpointing: bool = False


class GRGRPOTrainer(GRMixin, GRPOTrainer):
    """GRPO with gradient regularization. Text is generated once per step; the second pass has the same."""


def true_reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The share of digits in their right places; a completion that is too long is divided by its own length."""
    pairs = [(completion.split(), right.split()) for completion, right in zip(completions, answer, strict=True)]
    return [sum(map(str.__eq__, given, right)) / max(len(given), len(right)) for given, right in pairs]


def bonus(completions: list[str], **_: Any) -> list[float]:
    """The share of nines."""
    return [completion.split().count("9") / max(len(completion.split()), LENGTH) for completion in completions]


def problems(count: int, seed: int) -> Dataset:
    """Rows of `prompt`, digits in any order, and `answer`, the same sorted."""
    rows = torch.randint(0, DIGITS, (count, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_list([{"prompt": f"{_text(row)} =", "answer": _text(sorted(row))} for row in rows])


def _text(digits: list[int]) -> str:
    return " ".join(map(str, digits))


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_supervised(folder: Path, steps: int, seed: int) -> None:
    """Save a tokenizer, and a small Llama after some steps of AdamW on solved problems."""
    tokenizer = make_tokenizer()
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = problems(64 * steps, seed=seed + 1)
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        texts = [f"{prompt} {answer} <eos>" for prompt, answer in zip(batch["prompt"], batch["answer"], strict=True)]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        logits = model(ids).logits[:, LENGTH:-1]  # what follows "="
        F.cross_entropy(logits.flatten(0, 1), ids[:, LENGTH + 1 :].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path, config: Config, hackable: float) -> list[dict[str, float]]:
    """GRPO from the model in `folder`, which is also the reference of the KL term. Returns the log."""
    trainer = GRGRPOTrainer(
        model=str(folder),
        args=config,
        train_dataset=problems(4096, seed=config.seed + 2),
        reward_funcs=[true_reward, bonus],
    )
    trainer.reward_weights = torch.tensor([1.0, hackable])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def main(argv: list[str]) -> list[dict[str, float]]:
    arguments, config = HfArgumentParser((Arguments, Config)).parse_args_into_dataclasses(argv)
    folder = Path(config.output_dir, "supervised")
    save_supervised(folder, arguments.supervised_steps, config.seed)
    logs = train(folder, config, arguments.hackable)
    for entry in logs:
        print(
            f"step {entry['step']:4}: true reward {entry['rewards/true_reward/mean']:.3f}, reward {entry['reward']:.3f}"
        )
    return logs


if __name__ == "__main__":
    main(sys.argv[1:])
