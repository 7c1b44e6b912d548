"""What `report_to` hands on has our values in it. The trackers that are not installed are left out."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import toys

OURS = {"gr_lambda", "gr_r", "gr_grad_norm", "gr_perturbed_grad_norm", "ire_kappa", "ire_flat_fraction", "train_passes"}


def train(folder, tracker: str, **flags) -> dict[str, float]:
    """The last entry of the log that has a loss."""
    gr_and_ire = {"gr_warmup": "none", "ire_kappa": 1.0, "ire_start_step": 0, "max_steps": 2}
    trainer = toys.trainer(folder / "out", report_to=tracker, **gr_and_ire, **flags)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last = train(tmp_path, "tensorboard")
    (events,) = (tmp_path / "out" / "runs").glob("*/events*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert {f"train/{name}" for name in OURS} <= set(reader.Tags()["scalars"])
    for name in OURS:
        assert reader.Scalars(f"train/{name}")[-1].value == pytest.approx(last[name], rel=1e-6)  # kept as float32


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    last = train(tmp_path, "wandb", run_name="run")
    summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    wandb.finish()
    assert {name: summary[f"train/{name}"] for name in OURS} == {name: last[name] for name in OURS}
    assert config["gr_r"] == 0.1 and config["ire_kappa"] == 1.0


def test_trackio(tmp_path):
    """In a process of its own: the folder that it writes to is read as it is imported."""
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    code = (
        "import json, sys; from pathlib import Path; from test_tracking import train; folder = Path(sys.argv[1])\n"
        "last = train(folder, 'trackio', run_name='run', project='hf-gr')\n"
        "(folder / 'last.json').write_text(json.dumps(last))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent, env=environment, timeout=1800,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads((tmp_path / "last.json").read_text())
    with sqlite3.connect(tmp_path / "trackio" / "hf-gr.db") as database:
        logged = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    (*_, losses) = (entry for entry in logged if "train/loss" in entry)
    assert {name: losses[f"train/{name}"] for name in OURS} == {name: last[name] for name in OURS}
