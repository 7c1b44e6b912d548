"""What a run costs is counted while it runs: passes, tokens, seconds."""

import math

import pytest

from helpers import toys
from hf_gr import GRConfig
from hf_gr.cli.trainers import CausalLMTrainer


def train(tmp_path, **flags) -> CausalLMTrainer:
    settings = {"include_num_input_tokens_seen": "all", "max_steps": 6, "gr_lambda": 0, **flags}
    args = GRConfig(**toys.arguments(tmp_path, **settings))
    trainer = CausalLMTrainer(toys.llama(), args, train_dataset=toys.text(24), eval_dataset=toys.text(4))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        ({}, 6),
        ({"gr_lambda": None, "gr_warmup_steps": 2}, 6 + 4),
        ({"ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 2, "ire_probe_fraction": 0.5}, 6 + 2 * 0.5),
        ({"ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 0, "ire_mask": "uniform"}, 6),
    ],
    ids=str,
)
def test_passes_and_tokens_are_counted(flags, passes, tmp_path):
    trainer = train(tmp_path, **flags)
    costs = trainer.costs()
    assert costs["train_passes"] == passes
    assert costs["train_tokens"] == 6 * 2 * 12
    assert costs["peak_memory_bytes"] > 10**7
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in logged] == [24 * step for step in range(1, 7)]
    assert logged[-1]["train_passes"] == passes


class Clocked(CausalLMTrainer):
    """Time that stands still but for a second per step and 100 per evaluation."""

    now = 0.0

    def training_step(self, *args, **kwargs):
        Clocked.now += 1
        return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        Clocked.now += 100
        return super().evaluation_loop(*args, **kwargs)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("hf_gr.trainer.recording.time.perf_counter", lambda: Clocked.now)


def test_the_clock_stops_for_evaluations(clock, tmp_path):
    args = GRConfig(**toys.arguments(tmp_path, max_steps=4, gr_lambda=0, eval_strategy="steps", eval_steps=2))
    trainer = Clocked(toys.llama(), args, train_dataset=toys.text(24), eval_dataset=toys.text(4))
    trainer.train()
    assert trainer.costs()["train_seconds"] == 4
    entries = trainer.state.log_history
    assert [e["train_seconds"] for e in entries if "loss" in e] == [1, 2, 3, 4]
    assert [e["train_seconds"] for e in entries if "eval_loss" in e] == [2, 4]
    assert all(e["eval_perplexity"] == pytest.approx(math.exp(e["eval_loss"])) for e in entries if "eval_loss" in e)
    trainer.evaluate()
    assert trainer.costs()["train_seconds"] == 4


def test_a_resumed_run_goes_on_counting(clock, tmp_path):
    """What the run had cost that wrote the checkpoint counts; what an earlier train() had cost does not."""
    settings = {"include_num_input_tokens_seen": "all", "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
                "gr_warmup": "none", "ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 0}  # fmt: skip

    def trainer() -> Clocked:
        return Clocked(toys.llama(), GRConfig(**toys.arguments(tmp_path, **settings)), train_dataset=toys.text(24))

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    costs = [{k: v for k, v in t.costs().items() if k.startswith("train_")} for t in (whole, resumed)]
    assert costs[0] == costs[1] and costs[0]["train_seconds"] == 4
    resumed.train()
    assert [e["train_seconds"] for e in resumed.state.log_history if "loss" in e] == [1, 2, 3, 4]
