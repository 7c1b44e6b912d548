"""Examples run, in a short form, on the data and models that they name."""

import csv
import importlib

import pytest
from transformers import AutoModelForSequenceClassification

from helpers import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no GPU, no use_cpu


@pytest.fixture
def classify_text(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("classify_text").main


def test_text_from_scratch_and_from_a_pretrained_encoder(classify_text, tmp_path, capsys):
    scratch, tuned, file = tmp_path / "scratch", tmp_path / "tuned", tmp_path / "reviews.csv"
    short = ["--max_steps", "2", "--eval_strategy", "no", "--disable_tqdm", "True"]
    metrics = classify_text([*short, "--output_dir", str(scratch)])
    assert f"Error {metrics['eval_error']:.1%}" in capsys.readouterr().out
    assert "gradient regularization" in (scratch / "README.md").read_text()
    assert set(AutoModelForSequenceClassification.from_pretrained(scratch).config.label2id) >= {"asyncio", "xml"}

    with file.open("w", newline="") as out:
        rows = [{"text": f"{word} number {i}", "label": word} for i in range(10) for word in ("good", "bad")]
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    other = ["--dataset_name", str(file), "--model_name_or_path", str(scratch), "--output_dir", str(tuned)]
    classify_text([*short, *other])  # a head of ten classes, and two in the data
    assert AutoModelForSequenceClassification.from_pretrained(tuned).config.label2id == {"bad": 0, "good": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.txt", "", "give a CSV or JSON file"), ("a.csv", "words,label\na,b\n", "has no column text. Rename one")],
)
def test_data_that_cannot_be_used(name, text, message, classify_text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        classify_text(["--dataset_name", str(tmp_path / name), "--output_dir", str(tmp_path / "out")])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_reinforcement_learning_with_gr(monkeypatch, tmp_path, capsys):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("grpo_gr")
    short = [
        "--supervised_steps",
        "5",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "16",
    ]
    logs = example.main([*short, "--hackable", "1.5", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    assert [entry["gr_r"] > 0 for entry in logs] == [True, True]
    assert all(
        entry["reward"]
        == pytest.approx(entry["rewards/true_reward/mean"] + 1.5 * entry["rewards/bonus/mean"], abs=1e-6)
        for entry in logs
    )
    assert "step    2: true reward" in capsys.readouterr().out
    assert example.true_reward(["1 2 9 9", "1 2 3 4 9", ""], answer=["1 2 3 9"] * 3) == [0.75, 0.6, 0.0]
