"""Checkpoints written by earlier code still resume, and the resumed run ends as the uninterrupted one did.

The stored files and the code that wrote them are in `tests/fixtures/`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures.make_checkpoints import CHECKPOINTS, RUNS, SAVED, STEPS, logs_after_checkpoint, trainer

#: Largest difference of a weight, relative to the largest weight. It is 0 on the CPU that wrote the files; kernels for
#: other CPUs round the last bit of a float32 (6e-8) differently, which came to at most 9e-8 here.
TOLERANCE = 1e-6


def resumed(name: str, folder: Path, lose=None):
    """The run, resumed from its stored checkpoint; `lose` removes something from the optimizer state first."""
    checkpoint = folder / f"checkpoint-{SAVED}"
    shutil.copytree(CHECKPOINTS / name / checkpoint.name, checkpoint)
    if lose is not None:
        state = torch.load(checkpoint / "optimizer.pt")
        lose(state)
        torch.save(state, checkpoint / "optimizer.pt")
    run = trainer(name, folder)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


def deviation(name: str, run) -> float:
    """How far the weights are from those of the uninterrupted run."""
    old = load_file(CHECKPOINTS / name / "final.safetensors")
    new = run.model.state_dict()
    assert new.keys() == old.keys()
    scale = max(float(weight.abs().max()) for weight in old.values())
    return max(float((new[key] - weight).abs().max()) for key, weight in old.items()) / scale


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_continues_unchanged(name, tmp_path):
    run = resumed(name, tmp_path)
    logs = logs_after_checkpoint(run.state.log_history)
    expected = json.loads((CHECKPOINTS / name / "logs.json").read_text())
    assert [entry["step"] for entry in logs] == list(range(SAVED + 1, STEPS + 1))
    for entry, old in zip(logs, expected, strict=True):
        assert {key: entry.get(key) for key in old} == pytest.approx(old, rel=1e-5)
    assert deviation(name, run) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "lose"),
    [
        ("gr_ire", lambda state: state["state"].clear()),
        ("gr_ire", lambda state: state["ire"].pop("masks")),
        ("gr_ire", lambda state: state["ire"].pop("averages")),
        ("gr_ire", lambda state: state["ire"].pop("losses")),
        ("tvlars", lambda state: state["state"].clear()),
        ("tvlars", lambda state: [group.update(step=0) for group in state["param_groups"]]),
    ],
)
def test_lost_optimizer_state_is_noticed(name, lose, tmp_path):
    """Each part of the state changes the weights by far more than the tolerance (at least 1 percent, as stored)."""
    assert deviation(name, resumed(name, tmp_path, lose)) > 1000 * TOLERANCE
