"""Killed, out of disk, interrupted, not a number: nothing is lost, and nothing perturbed is kept."""

import os
import random
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers import faults_worker, forks, toys
from hf_gr import GRConfig, GRTrainer
from hf_gr.trainer.checkpoints import last_complete_checkpoint
from hf_gr.trainer.guards import PATIENCE

#: Seconds for a training that takes a few on an idle machine.
PATIENT = 600

# ---- Killed, and started again ----


def start(folder: Path, steps: int, **kwargs) -> BaseProcess:
    """Starts a training in a process of its own."""
    folder.mkdir(exist_ok=True)
    return forks.start(faults_worker.train, str(folder), steps, **kwargs)


def uninterrupted(folder: Path, steps: int) -> tuple[torch.Tensor, float]:
    """The final weights, and how much processor time they took."""
    process = start(folder, steps)
    process.join(PATIENT)
    assert process.exitcode == 0
    return torch.load(folder / "final.pt"), float((folder / "seconds.txt").read_text())


def incomplete(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("checkpoint-*") if not (p / "trainer_state.json").exists()]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, tmp_path):
    """Half of the kills come at a random moment, half while a checkpoint is being written."""
    draw, folder, steps = random.Random(0), tmp_path / "killed", 12 * kills  # more than all of them together take
    weights, seconds = uninterrupted(tmp_path / "whole", steps)
    for kill in range(kills):
        if kill % 2 == 0:
            when, death = {"dies_after": draw.uniform(0.2, 1.0) * seconds / steps * 8}, signal.SIGPROF
        else:
            size = draw.choice([faults_worker.NOT_THE_WEIGHTS, faults_worker.NOT_THE_OPTIMIZER])
            when, death = {"room": (draw.randrange(8), size), "dies_while_saving": True}, signal.SIGXFSZ
        process = start(folder, steps, **when)
        process.join(PATIENT)
        assert process.exitcode == -death, f"kill {kill}"
        assert incomplete(folder) or kill % 2 == 0
    process = start(folder, steps)
    process.join(PATIENT)
    assert process.exitcode == 0
    assert torch.equal(torch.load(folder / "final.pt"), weights)
    log = (folder / "log.txt").read_text()
    assert "is not used: " in log and "is missing; the checkpoint is incomplete" in log


def test_a_full_disk_loses_nothing(tmp_path):
    folder, steps = tmp_path / "full", 8
    weights, _ = uninterrupted(tmp_path / "whole", steps)
    process = start(folder, steps, room=(2, faults_worker.NOT_THE_WEIGHTS))
    process.join(PATIENT)
    assert process.exitcode == 1
    message = (folder / "error.txt").read_text()
    assert (
        f"{folder}/checkpoint-4 could not be written: " in message and "untouched: checkpoint-2. Make room" in message
    )
    assert message.endswith("resume_from_checkpoint=True in Python, --resume_from_checkpoint last for a script.")
    assert last_complete_checkpoint(str(folder)) == str(folder / "checkpoint-2")
    process = start(folder, steps)
    process.join(PATIENT)
    assert process.exitcode == 0
    assert torch.equal(torch.load(folder / "final.pt"), weights)


def test_the_last_complete_checkpoint(tmp_path, caplog):
    trainer = GRTrainer(
        toys.llama(),
        GRConfig(**toys.arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, gr_warmup="none")),
        train_dataset=toys.text(),
    )
    assert last_complete_checkpoint(str(tmp_path)) is None
    trainer.train()
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    assert last_complete_checkpoint(str(tmp_path)) == str(checkpoints[2])
    (checkpoints[2] / "rng_state.pth").unlink()
    (checkpoints[1] / "checkpoint-is-incomplete.txt").touch()
    caplog.clear()
    assert last_complete_checkpoint(str(tmp_path)) == str(checkpoints[0])
    assert f"{checkpoints[2]} is not used: rng_state.pth is missing" in caplog.text
    assert f"{checkpoints[1]} is not used: checkpoint-is-incomplete.txt" in caplog.text
    resumed = GRTrainer(toys.llama(), trainer.args, train_dataset=toys.text())
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(toys.weights(resumed.model), toys.weights(trainer.model))
    for checkpoint in checkpoints:
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint=True: there is no complete checkpoint in"):
        resumed.train(resume_from_checkpoint=True)


# ---- Signals in the second pass ----


@pytest.mark.parametrize("ends", [False, True])
def test_a_signal_handler_saves_the_weights_and_not_the_perturbed_ones(ends, recorder, tmp_path):
    """SIGTERM comes amid the second pass of step 3, and its handler saves; then the run goes on, or ends."""

    class Terminated(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.gr_second_pass and self.state.global_step == 2:
                assert not torch.equal(toys.weights(self.model), recorder.path[2])
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

    def save(signum, frame):
        trainer.save_model(str(tmp_path / "saved"))
        if ends:
            raise SystemExit

    args = GRConfig(**toys.arguments(tmp_path, gr_warmup="none"))
    whole = toys.PathRecorder()
    GRTrainer(toys.llama(), args, train_dataset=toys.text(), callbacks=[whole]).train()
    trainer = Terminated(toys.llama(), args, train_dataset=toys.text(), callbacks=[recorder])
    before = signal.signal(signal.SIGTERM, save)
    try:
        if ends:
            with pytest.raises(SystemExit):
                trainer.train()
            assert torch.equal(toys.weights(trainer.model), whole.path[2])
        else:
            trainer.train()
            assert torch.equal(toys.weights(trainer.model), whole.path[-1])
    finally:
        signal.signal(signal.SIGTERM, before)
    saved = toys.llama()
    saved.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    assert torch.equal(toys.weights(saved), whole.path[2])


# ---- Not a number ----


def poisoned(output_dir, steps, base=GRTrainer, value=float("nan"), **flags):
    """A trainer whose loss is `value` in the given steps, numbered from 1, and what it recorded."""

    class Poisoned(base):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * value if self.state.global_step + 1 in steps else loss

    recorder = toys.PathRecorder()
    args = GRConfig(**toys.arguments(output_dir, **{"optim": "sgd", "learning_rate": 0.1, "max_steps": 8, **flags}))
    return Poisoned(toys.llama(), args, train_dataset=toys.text(), callbacks=[recorder]), recorder


METHODS = {
    "gr": {"gr_warmup": "none"},
    "warmup": {"gr_warmup_steps": 7},
    "ire": {"gr_lambda": 0, "ire_kappa": 1.0, "ire_start_step": 0},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_is_skipped(method, value, tmp_path, caplog):
    trainer, recorder = poisoned(tmp_path, {3, 6, 7}, value=value, **METHODS[method])
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(recorder.path, recorder.path[1:], strict=False)]
    assert moved == [True, True, False, True, True, False, False, True]
    assert recorder.path[-1].isfinite().all()
    assert trainer.nonfinite_guard.skipped_steps == 3
    assert "Step 3: the gradient is not finite. The step is skipped" in caplog.text and "Step 7:" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_three_in_a_row_stop_the_run_and_say_where(method, tmp_path):
    trainer, recorder = poisoned(tmp_path, set(range(4, 9)), **METHODS[method])
    with pytest.raises(FloatingPointError, match=r"The gradients of steps 4 to 6 are not finite.*weights of step 3"):
        trainer.train()
    assert torch.equal(toys.weights(trainer.model), recorder.path[3])
    trainer, recorder = poisoned(tmp_path, set(range(4, 9)), gr_on_nonfinite="skip", **METHODS[method])
    trainer.train()
    assert torch.equal(recorder.path[-1], recorder.path[3]) and trainer.state.global_step == 8


def test_with_a_gradient_scaler_only_skips_that_no_scale_helps_count(tmp_path):
    flags = {"gr_warmup": "none", "max_steps": 40}
    try:
        trainer, recorder = poisoned(tmp_path, set(range(3, 99)), base=toys.ScaledTrainer, **flags)
        # The scale falls from 1024 = 2^10 in step 3 to 1 in step 12, and below it from step 13 on.
        with pytest.raises(FloatingPointError, match=f"The gradients of steps 13 to {12 + PATIENCE} are not finite"):
            trainer.train()
    finally:
        trainer.accelerator.state._reset_state()
    assert torch.equal(toys.weights(trainer.model), recorder.path[2])


class BreaksWeights(TrainerCallback):
    """From the second step on the learning rate is NaN, as a schedule may make it."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 1:
            optimizer.param_groups[0]["lr"] = float("nan")


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_get_into_no_checkpoint_and_end_the_run(method, save_strategy, tmp_path):
    """Two steps, fewer than what ends a run for its gradients."""
    flags = {"save_strategy": save_strategy, "save_steps": 1, **METHODS[method], "max_steps": 2}
    trainer, _ = poisoned(tmp_path, (), **{**flags, "gr_warmup_steps": None})
    trainer.add_callback(BreaksWeights())
    after = 1 if save_strategy == "steps" else 0
    with pytest.raises(FloatingPointError, match=f"weights are not finite after step 2. After step {after} they were"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"][:after]


def test_weights_that_are_not_finite_are_not_taken_for_gradients(tmp_path):
    """Even where bad gradients are left out for as long as they come, the third step says what has happened."""
    trainer, _ = poisoned(tmp_path, (), gr_warmup="none", gr_on_nonfinite="skip")
    trainer.add_callback(BreaksWeights())
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 2\. After step 0 they were"):
        trainer.train()
    with pytest.raises(FloatingPointError, match="weights are not finite before step 1"):
        trainer.train()


def test_a_run_that_skips_all_its_steps_fails(tmp_path):
    trainer, _ = poisoned(tmp_path, {1, 2}, max_steps=2, gr_warmup="none")
    with pytest.raises(FloatingPointError, match="gradients of all 2 steps are not finite: nothing was trained"):
        trainer.train()


def test_a_norm_that_overflows_is_not_finite(tmp_path, caplog):
    """Each element fits into float32, their norm does not, and clipping makes them 0."""
    trainer, recorder = poisoned(tmp_path, {2}, value=1e30, gr_warmup="none", max_steps=3)
    trainer.train()
    assert trainer.nonfinite_guard.skipped_steps == 1 and "Step 2: the gradient is not finite" in caplog.text
    assert torch.equal(recorder.path[2], recorder.path[1]) and not torch.equal(recorder.path[3], recorder.path[2])


def test_without_gr_and_ire_nothing_is_guarded(tmp_path, caplog):
    trainer, recorder = poisoned(tmp_path, {2}, gr_lambda=0, gr_on_nonfinite="skip", max_steps=2)
    trainer.train()
    assert not recorder.path[-1].isfinite().any()
    assert "gr_on_nonfinite: no effect with gr_lambda=0 and without IRE" in caplog.text
    assert "The weights are not finite after step 2. After step 0 they were" in caplog.text
