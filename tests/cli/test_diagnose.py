"""`hf-gr diagnose` on runs as the trainer leaves them."""

import pytest

from helpers import ROOT, toys, training
from hf_gr.analysis.diagnosis import CANNOT_TELL, NO, YES
from hf_gr.cli import command


def diagnosed(folder, capsys) -> list[tuple[str, str]]:
    """Verdict and sentence of each finding, its lines joined."""
    capsys.readouterr()
    command.main(["diagnose", str(folder)])
    printed = capsys.readouterr().out
    assert all(len(line) <= 110 for line in printed.splitlines())
    return [(line[:13].strip(), line[13:]) for line in printed.replace("\n" + " " * 13, " ").splitlines()]


def test_a_run_of_the_trainer(tmp_path, capsys):
    """Saved as a checkpoint alone, as a run that was stopped leaves it."""
    training.run(
        toys.vit(),
        toys.images(),
        tmp_path,
        max_steps=10,
        warmup_steps=4,
        gr_warmup="zero",
        gr_warmup_steps=2,
        save_strategy="steps",
        save_steps=10,
    )
    (tmp_path / "run.json").unlink()
    (early, active), (_, norm), (rates, _), (_, gauge), (_, zero), _ = diagnosed(tmp_path, capsys)
    assert early == "yes" and "in 8 of the first 10 steps, at full strength" in active
    assert "AdamW" in norm and "from 10 logged norms" in norm
    assert "gr_linearity, the median of 8 log entries" in gauge
    assert rates == "cannot tell" and "--gr_warmup zero --gr_warmup_steps 10" in zero


def test_a_run_without_gr(tmp_path, capsys):
    trainer = training.run(toys.vit(), toys.images(), tmp_path, max_steps=6, gr_lambda=0, optim="sgd")
    trainer.save_state()
    active, (_, norm) = diagnosed(tmp_path, capsys)
    assert active == ("no", "GR was off (gr_lambda = 0) in all 6 recorded steps.")
    assert "SGD keeps no second moments" in norm


RUNS = sorted((ROOT / "tests" / "fixtures" / "runs").iterdir())


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_old_records(folder, capsys):
    found = diagnosed(folder, capsys)
    assert found and all(verdict in (YES, NO, CANNOT_TELL) and sentence for verdict, sentence in found)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"there is no run\.json\. Give the output folder"):
        command.main(["diagnose", str(tmp_path)])
