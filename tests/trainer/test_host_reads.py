"""Between logging steps the host reads nothing from the device that `Trainer` itself does not read."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import toys
from helpers.host_reads import HostReads, take_the_way_of_a_gpu
from hf_gr import IRE, GRConfig, GRTrainer
from hf_gr.optim.ascents import ASCENTS
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm, scale_gradients_
from hf_gr.optim.radius_rules import RADIUS_RULES
from hf_gr.trainer.guards import PATIENCE


class ReadsOfSteps(TrainerCallback):
    """What the host reads in each step."""

    def __init__(self):
        self.steps: list[dict[str, int]] = []

    def on_step_begin(self, *_, **__):
        self._reads = HostReads().__enter__()

    def on_step_end(self, *_, **__):
        self._reads.__exit__(None, None, None)
        self.steps.append(dict(self._reads.by_caller))


def reads_of(output_dir, trainer_class=GRTrainer, config=GRConfig, **flags) -> list[dict[str, int]]:
    reads = ReadsOfSteps()
    # The fused one is the default of `Trainer`; others read the number of their step on a CPU.
    common = {"max_steps": 4, "logging_steps": 100, "learning_rate": 1e-3, "optim": "adamw_torch_fused"}
    args = config(**toys.arguments(output_dir, **{**common, **flags}))
    trainer = trainer_class(toys.vit(), args, train_dataset=toys.images(), callbacks=[reads])
    if isinstance(trainer, GRTrainer):
        trainer.nonfinite_guard.looks_at_once = False  # as on a GPU
    trainer.train()
    return reads.steps


CASES = {
    **{f"ascent={name}": {"gr_ascent": name} for name in ASCENTS},
    **{f"rule={name}": {"gr_radius_rule": name} for name in RADIUS_RULES},
    "lambda": {"gr_lambda": 0.08},
    "clip": {"gr_clip": 1.0, "gr_lambda": 0.08},
    "reuse": {"gr_reuse": 0.5, "gr_interval": 2},
    "momentum between": {"gr_momentum_r": 0.2, "gr_interval": 2},
    "micro": {"gr_scope": "micro", "gradient_accumulation_steps": 2},
    "functional": {"gr_second_pass_kind": "functional"},
    "IRE": {"gr_lambda": 0, "ire_kappa": 2.0, "ire_start_step": 0, "ire_interval": 100},
    "GR and IRE": {"ire_kappa": 2.0, "ire_start_step": 0, "ire_interval": 100},
}


@pytest.fixture(scope="module")
def plain_reads(tmp_path_factory):
    return {steps: reads_of(tmp_path_factory.mktemp("plain"), Trainer, TrainingArguments,
                            gradient_accumulation_steps=steps) for steps in (1, 2)}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_gr_reads_what_a_plain_one_reads(case, plain_reads, tmp_path):
    expected = plain_reads[CASES[case].get("gradient_accumulation_steps", 1)]
    # The first step creates state, and the first one of `functional` looks at the graph.
    steps = reads_of(tmp_path, **{"gr_warmup": "none", **CASES[case]})[1:]
    # On a CPU, where it waits for nothing, IRE reads its kappa.
    assert [{k: n for k, n in step.items() if "optim/ire.py" not in k} for step in steps] == expected[1:]
    assert any(expected)


CHOICES = {
    "images": {},
    "per tensor": {"ire_scope": "per_tensor"},
    "average of half the batch": {"ire_beta": 0.9, "ire_probe_fraction": 0.5},
    "text": {},
    "scaled": {},
}


@pytest.mark.parametrize("case", CHOICES)
def test_a_choice_of_coordinates_reads_nothing(case, monkeypatch, tmp_path):
    take_the_way_of_a_gpu(monkeypatch)
    flags = {"gr_lambda": 0, "ire_kappa": 2.0, "ire_start_step": 0, "ire_interval": 1, "max_steps": 3}
    args = GRConfig(**toys.arguments(tmp_path, **flags, logging_steps=100, **CHOICES[case]))
    model, data = (toys.llama(), toys.text()) if case == "text" else (toys.vit(), toys.images())
    trainer = toys.ScaledTrainer if case == "scaled" else GRTrainer
    trainer = trainer(model, args, train_dataset=data)
    trainer.nonfinite_guard.looks_at_once = False
    choose, found = trainer.ire.choose, []

    def counted(batch_samples) -> None:
        with HostReads() as reads:
            choose(batch_samples)
        # On a CPU, where it waits for nothing, IRE looks whether the gradient is finite; a model has its own reads.
        theirs = ("optim/ire.py", "transformers/")
        found.append([where for where in reads.by_caller if not any(part in where for part in theirs)])
        assert reads.operations["mm"] + reads.operations["addmm"] > 0

    monkeypatch.setattr(trainer.ire, "choose", counted)
    trainer.train()
    assert found == [[]] * 3 and trainer.ire_optimizer.updates == trainer.recorder.record.segments[-1].ire_choices == 3


@pytest.mark.parametrize("scale", [1.0, torch.full((), 0.5, device="meta")])
def test_a_step_of_ire_needs_no_value(scale):
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(8, 8)) for _ in range(3)]
        for p in params:
            p.grad = torch.empty(8, 8)
    ire = IRE(torch.optim.SGD(params, lr=0.1, momentum=0.9), kappa=2.0, mask="uniform")
    ire.kappa_scale = scale
    ire.update_mask()
    with HostReads() as reads:
        ire.step()
    assert reads.total == 0 and ire.has_mask


@pytest.mark.parametrize("count", [5, 200])
@pytest.mark.parametrize("degree", [0.1, 0.08])
@pytest.mark.parametrize("ascent", [name for name, entry in ASCENTS.items() if entry.passes == 2])
def test_bookkeeping_is_a_few_calls_without_a_value(ascent, degree, count):
    """On the meta device, whose tensors have no values to read and take the path of a GPU."""
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(8, 8)) for _ in range(count)]
        for p in params:
            p.grad = torch.empty(8, 8)
    with HostReads() as reads:
        perturbation = Perturbation(params, ascent)
        perturbation.apply(0.1, gradient_norm(params), grad_scale=(0.1 - degree) / degree)
        for p in params:  # the second pass
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
        perturbation.restore()
        scale_gradients_(params, degree / 0.1)
    calls = sum(calls for name, calls in reads.operations.items() if name.startswith("_foreach"))
    adaptive = ascent != "gradient"
    assert calls == 5 + 6 * adaptive + 2 * (degree != 0.1) and reads.total == 0


# ---- A gradient that is not finite ----


def poisoned(output_dir, steps, **flags):
    """A trainer as on a GPU, with gradients that are not finite in some steps, and the weights after each."""

    class Poisoned(GRTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.nan if self.state.global_step + 1 in steps else loss

    recorder = toys.PathRecorder()
    common = {"gr_warmup": "none", "max_steps": 8, "logging_steps": 4, "optim": "adamw_torch_fused"}
    args = GRConfig(**toys.arguments(output_dir, **{**common, **flags}))
    trainer = Poisoned(toys.vit(), args, train_dataset=toys.images(), callbacks=[recorder])
    trainer.nonfinite_guard.looks_at_once = False
    return trainer, recorder


OPTIMIZERS = {
    "fused": {},
    "fused SGD": {"optim": "sgd", "optim_args": "fused=True"},
    "not fused": {"optim": "adamw_torch"},
    "IRE": {"ire_kappa": 1.0, "ire_start_step": 0},
    "IRE without decay": {
        "ire_kappa": 1.0,
        "ire_start_step": 0,
        "ire_amplify_weight_decay": False,
        "weight_decay": 0.1,
    },
    "LAMB": {"optim": "lamb"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_and_is_told_at_the_next_logging_step(optimizer, tmp_path, caplog):
    told = []

    class Tells(TrainerCallback):
        def on_step_end(self, args, state, *_, **__):
            told.append(caplog.text.count("the gradient is not finite. The step is skipped"))

    trainer, recorder = poisoned(tmp_path, {2, 3, 5}, **OPTIMIZERS[optimizer])
    trainer.add_callback(Tells())
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in zip(recorder.path, recorder.path[1:], strict=False)]
    assert moved == [True, False, False, True, False, True, True, True] and recorder.path[-1].isfinite().all()
    assert told == [0, 0, 0, 2, 2, 2, 2, 3]
    segment = trainer.recorder.segment
    assert (segment.skipped_steps, segment.regularized_steps) == (3, 5) == (trainer.nonfinite_guard.skipped_steps, 5)


def test_skipping_leaves_the_state_of_the_optimizer_alone(tmp_path):
    """As if the optimizer had not been called, as on a CPU."""
    device, _ = poisoned(tmp_path / "device", {2, 3})
    host, _ = poisoned(tmp_path / "host", {2, 3})
    host.nonfinite_guard.looks_at_once = True
    for trainer in (device, host):
        trainer.train()
    assert torch.equal(toys.weights(device.model), toys.weights(host.model))
    for mine, its in zip(device.optimizer.state.values(), host.optimizer.state.values(), strict=True):
        assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


def test_the_run_stops_at_the_logging_step_after_too_many(tmp_path, monkeypatch):
    trainer, recorder = poisoned(tmp_path, set(range(6, 9)))
    with pytest.raises(FloatingPointError, match=r"of steps 6 to 8 are not finite.*has the weights of step 5"):
        trainer.train()
    assert PATIENCE == 3 and torch.equal(toys.weights(trainer.model), recorder.path[5])

    monkeypatch.setattr("hf_gr.trainer.guards.MOST_UNREAD", 4)  # a run that logs nothing
    trainer, _ = poisoned(tmp_path, {2, 3, 4}, logging_strategy="no")
    with pytest.raises(FloatingPointError, match="of steps 2 to 4 are not finite"):
        trainer.train()

    trainer, _ = poisoned(tmp_path, {1, 2, 3})  # the fourth step has recovered
    trainer.train()
    assert trainer.nonfinite_guard.skipped_steps == 3
