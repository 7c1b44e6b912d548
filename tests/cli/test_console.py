"""What a run prints: the plan that its costs keep, lines in place of dictionaries, and its twin."""

import json
import re
import shlex

import pytest

from helpers import toys
from helpers.scripts import load_script
from hf_gr import GRConfig
from hf_gr.cli import console, twins
from hf_gr.cli.trainers import CausalLMTrainer
from hf_gr.reporting.record import read_record

IRE = {"ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 2}


def trained(folder, model=None, **flags) -> CausalLMTrainer:
    args = GRConfig(**toys.arguments(folder, **{"gr_lambda": 0, **flags}))
    trainer = CausalLMTrainer(toys.llama(), args, train_dataset=toys.text(24), eval_dataset=toys.text(4))
    console.talk(trainer, model, "random tokens")
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "6 steps of one pass each"),
        ({"gr_lambda": None, "gr_warmup_steps": 2}, "GR at r = 0.1 from step 3 of 6: 10 passes, 1.67 times"),
        ({"gr_lambda": None, "gr_warmup": "r", "gr_warmup_steps": 2, "gr_interval": 2}, "from step 1 of 6: "),
        (
            {"gr_lambda": None, "gr_warmup_steps": 2, "gr_ascent": "momentum"},
            "from step 3 of 6: 6 passes, as many as training without it",
        ),
        ({"gr_lambda": None, "gr_warmup": "none", "gradient_accumulation_steps": 3}, "from step 1 of 6: 12 passes"),
        (IRE, "IRE at kappa = 1 from step 3 of 6: 8 passes, 1.33 times those of training without it"),
        ({**IRE, "ire_probe_fraction": 0.3, "per_device_train_batch_size": 4}, ": 7 passes"),
        ({**IRE, "gr_lambda": None, "gr_warmup_steps": 2}, "12 passes, 2 times those of training without them"),
        ({**IRE, "ire_mask": "uniform"}, ": 6 passes"),
    ],
    ids=str,
)
def test_the_announced_passes_are_those_that_are_counted(flags, words, tmp_path, capsys):
    trainer = trained(tmp_path, **flags)
    (cost,) = re.findall(r"^Cost: (.*)\.$", capsys.readouterr().out, re.MULTILINE)
    assert words in cost
    announced = re.search(r"([\d.]+) passes", cost)
    assert trainer.costs()["train_passes"] == pytest.approx(float(announced[1]) if announced else 6)
    assert sum(trainer.planned_passes()) == pytest.approx(trainer.costs()["train_passes"])


def test_a_run_prints_one_short_line_per_log(tmp_path, capsys):
    trained(tmp_path, "llama-toy", gr_lambda=None, gr_warmup_steps=2, eval_strategy="steps", eval_steps=3)
    model, data, method, _, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Model: llama-toy, LlamaForCausalLM with [\d,]+ parameters\.", model)
    assert data == "Data: random tokens." and method.startswith("Method: optim=adamw_torch_fused, GR with r=0.1")
    assert len(lines) == 6 + 2 and max(map(len, lines)) <= 120 and not any("{" in line for line in lines)
    number, clock = r"[-+\d.e]+", r"\d\d:\d\d"
    assert re.fullmatch(rf"step 1 +loss {number}  lr {number}  \|g1\| {number}  {clock}, {clock} left", lines[0])
    assert re.fullmatch(rf"step 3 +loss {number}  lr {number}  \|g1\| {number}  \|g2\| .* left", lines[2])
    assert re.fullmatch(rf"step 3 +eval  loss {number}  perplexity {number}", lines[3])
    assert "left" not in lines[-2] and lines[-2].startswith("step 6 ")


def test_the_time_left_counts_second_passes(tmp_path):
    """Two of six steps are done, of one pass each; four of two passes are left."""
    trainer = trained(tmp_path, gr_lambda=None, gr_warmup_steps=2)
    screen = console.Console(trainer, None, "")
    screen._planned, screen._begin = [1, 1, 2, 2, 2, 2], console.Begin(0, 0.0, 0.0, 0.0)
    screen._costs = lambda: (2.0, 10.0)
    trainer.state.global_step = 2
    assert screen._seconds_left(trainer.state, 10.0) == 40
    assert screen._seconds_left(trainer.state, 12.0) == 40 + 4  # a second per step beside training
    assert [screen._begin.step, *screen._planned[:2]] == [0, 1, 1]


def test_a_plain_trainer_prints_what_transformers_prints(tmp_path, capsys):
    trainer = toys.trainer(tmp_path, gr_warmup="none", max_steps=1)
    trainer.train()
    assert "Cost:" not in capsys.readouterr().out
    assert not any(isinstance(callback, console.Console) for callback in trainer.callback_handler.callbacks)


# ---- Twins ----


@pytest.mark.parametrize(
    ("argv", "flags", "expected"),
    [
        (["--seed", "1"], {}, ("GR", "--seed 1 --gr_lambda 0 --output_dir out-without-gr")),
        (
            [
                "r.yaml",
                "--gr_r",
                "0.2",
                "--gr-warmup=none",
                "--output_dir",
                "out",
                "--overwrite_output_dir",
                "--seed=1",
            ],
            {},
            ("GR", "r.yaml --seed=1 --gr_lambda 0 --output_dir out-without-gr"),
        ),
        (["--push_to_hub", "--hub_model_id", "me/it"], {}, ("GR", "--gr_lambda 0 --output_dir out-without-gr")),
        (
            ["--gr_lambda", "0", "--ire_kappa", "2", "--image_mean", "1", "2", "3"],
            {"gr_lambda": 0, "ire_kappa": 2.0},
            ("IRE", "--gr_lambda 0 --image_mean 1 2 3 --ire_kappa 0 --output_dir out-without-ire"),
        ),
        ([], {"gr_lambda": 0}, None),
    ],
)
def test_the_command_of_a_twin(argv, flags, expected):
    args = GRConfig(output_dir="out", use_cpu=True, **flags)
    command = twins.twin_command(["hf-gr", "vit"], argv, args)
    assert command == (expected and (expected[0], f"hf-gr vit {expected[1]}"))


def test_a_run_and_its_twin_are_compared(tmp_path, capsys, monkeypatch):
    """The command that the first prints is run, and prints the comparison."""
    monkeypatch.setattr("sys.argv", ["pytest"])
    main = load_script("train_vit").main
    short = ["--max_train_samples", "64", "--max_eval_samples", "50", "--num_train_epochs", "2", "--use_cpu"]
    main([*short, "--output_dir", str(tmp_path / "gr")])
    (command,) = re.findall(r"^The same without GR: (.*)$", capsys.readouterr().out, re.MULTILINE)
    start, argv = command.split(" --", 1)[0], shlex.split("--" + command.split(" --", 1)[1])
    assert start == "python -m hf_gr.scripts.train_vit"
    main([*short, "--gr_lambda", "0", "--seed", "7", "--output_dir", str(tmp_path / "another")])
    assert "Twin" not in capsys.readouterr().out
    main(argv)
    (line,) = re.findall(r"^Twin +(.*)$", capsys.readouterr().out, re.MULTILINE)
    folders = [tmp_path / "gr", tmp_path / "gr-without-gr"]
    errors = [json.loads((folder / "all_results.json").read_text())["eval_error"] for folder in folders]
    shown = re.fullmatch(
        r"error ([\d.]+) % \[([\d.]+), ([\d.]+)\] with GR, ([\d.]+) % \[.*\] without it \(95 % Wilson intervals\)\. "
        rf"The run with it: {folders[0]}",
        line,
    )
    assert [float(shown[1]), float(shown[4])] == pytest.approx([100 * error for error in errors], abs=0.01)
    assert float(shown[2]) < float(shown[1]) < float(shown[3])
    (same,) = twins.comparisons(folders[0])
    assert same == line.replace(f"with it: {folders[0]}", f"without it: {folders[1]}")
    (folders[1] / "run.json").write_text("{")
    assert not list(twins.comparisons(folders[0])) and read_record(folders[0]).method["gr"]


def test_an_interval_of_wilson():
    """Of 9 in 360: Wilson's formula by hand."""
    p, n, z = 9 / 360, 360, 1.959964
    center, half = (p + z**2 / (2 * n)), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((center + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert twins._interval(p, n) == f"{100 * low:.2f}, {100 * high:.2f}"
