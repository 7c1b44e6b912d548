"""evaluate_forgetting.py on two tiny Llamas, offline."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.scripts import check, load_script
from hf_gr.analysis.forgetting import Point, at_target
from hf_gr.data.text import train_tokenizer
from hf_gr.models.presets import create_llama

FIRST = "\n\n".join(f"line {i}: the quick brown fox jumps over {i % 11} lazy dogs." for i in range(400))
SECOND = "\n\n".join(f"def f{i}(x):\n    return x + {i % 7}" for i in range(800))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two Llamas with one tokenizer, and two datasets."""
    folder = tmp_path_factory.mktemp("forgetting")
    for name, text in (("first", FIRST), ("second", SECOND)):
        (folder / f"{name}.txt").write_text(text)
    tokenizer = train_tokenizer([FIRST, SECOND], 300, 64)
    for seed in (0, 1):
        torch.manual_seed(seed)
        create_llama("llama-tiny", 300, 64, tokenizer.eos_token_id).save_pretrained(folder / f"run-{seed}")
        tokenizer.save_pretrained(folder / f"run-{seed}")
    return folder


def arguments(folder, *flags):
    data = ("--dataset_name", folder / "first.txt", "--finetune_dataset_name", folder / "second.txt")
    return [str(word) for word in (*data, "--block_size", 16, "--max_examples", 4, "--device", "cpu", *flags)]


def evaluate(folder, out, *argv) -> dict:
    """The content of forgetting.json."""
    load_script("evaluate_forgetting").main(
        [*map(str, argv), *arguments(folder, "--output_dir", out, "--learning_rate", 3e-3, "--eval_steps", 3)]
    )
    return json.loads((out / "forgetting.json").read_text())


def points_of(checkpoint):
    return [Point(**point) for point in checkpoint["frontier"]]


def test_side_by_side_at_the_target_of_all(folder, tmp_path, capsys):
    runs = [folder / "run-0", folder / "run-1"]
    before = AutoModelForCausalLM.from_pretrained(runs[0]).state_dict()
    found = evaluate(folder, tmp_path, *runs, "--max_steps", 8, "--labels", "A", "A")
    text = (tmp_path / "forgetting.md").read_text()
    assert capsys.readouterr().out == text and (tmp_path / "forgetting.png").stat().st_size > 0
    checkpoints = [found["checkpoints"][str(run)] for run in runs]
    frontiers = [points_of(checkpoint) for checkpoint in checkpoints]
    assert [point.step for point in frontiers[0]] == [0, 3, 6, 8]
    assert found["target"] == max(min(point.finetuning_loss for point in points) for points in frontiers)
    for checkpoint, points in zip(checkpoints, frontiers, strict=True):
        assert checkpoint["examples"] == checkpoint["finetune_examples"] == 4 and checkpoint["block_size"] == 16
        reached = at_target(points, found["target"])
        assert checkpoint["results"]["forgetting"] == reached.pretraining_loss - points[0].pretraining_loss
    values = [checkpoint["results"]["forgetting"] for checkpoint in checkpoints]
    assert values[0] != values[1]
    (row,) = (line for line in text.splitlines() if line.startswith("| A (2) |"))
    assert row.split(" | ")[-1].startswith(f"{sum(values) / 2:.4g} ± ")
    after = AutoModelForCausalLM.from_pretrained(runs[0]).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_given_target_ends_fine_tuning_or_has_no_value(folder, tmp_path):
    run = folder / "run-0"
    first = points_of(evaluate(folder, tmp_path, run, "--max_steps", 6)["checkpoints"][str(run)])
    target = (first[0].finetuning_loss + first[1].finetuning_loss) / 2
    found = evaluate(folder, tmp_path, run, "--max_steps", 6, "--target_loss", target)["checkpoints"][str(run)]
    assert points_of(found) == first[:2] and found["results"]["steps"] == pytest.approx(1.5)
    for target, why in ((0.01, "does not reach the target in 6 steps"), (9, "is at the target before fine-tuning")):
        found = evaluate(folder, tmp_path, run, "--max_steps", 6, "--target_loss", target)["checkpoints"][str(run)]
        text = (tmp_path / "forgetting.md").read_text()
        assert (
            found["results"]["forgetting"] is None and why in text and text.splitlines()[-1].endswith("| - | - | - |")
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--target_loss 0", ["target_loss=0", "more than 0"]),
        ("--max_steps 0", ["max_steps=0", "at least 1"]),
        ("--eval_steps 0", ["eval_steps=0", "at least 1"]),
        ("--learning_rate nan", ["learning_rate=nan", "more than 0"]),
        ("--labels A B", ["labels=A B", "2 for 1 checkpoints", "Give"]),
        ("--finetune_dataset_name @first.txt", ["finetune_dataset_name=", "Give other data"]),
        ("--finetune_dataset_name @none", ["finetune_dataset_name=", "could not be loaded", "Give"]),
        ("--image_max_value 3", ["--image_max_value", "no such flag"]),
        ("--block_size 65", ["block_size=65", "context of 64"]),
    ],
)
def test_bad_inputs(flags, words, folder):
    argv = [word.replace("@", f"{folder}/") for word in flags.split()]
    check(load_script("evaluate_forgetting").main, [folder / "run-0", *arguments(folder, *argv)], *words)


def pretrain(folder, out, *flags):
    argv = ("--dataset_name", folder / "first.txt", "--final_forgetting", folder / "second.txt", "--output_dir", out,
            "--vocab_size", 300, "--block_size", 16, "--max_eval_blocks", 4, "--per_device_train_batch_size", 8,
            "--max_steps", 2, "--ire_kappa", 0, "--gr_lambda", 0, "--use_cpu", "--report_to", "none",
            "--forgetting_max_steps", 4, "--forgetting_eval_steps", 2, *flags)  # fmt: skip
    load_script("pretrain_llama").main([str(word) for word in argv])


def test_at_the_end_of_pretraining(folder, tmp_path, caplog):
    """The same as afterwards; a loss that is not reached is no number, and the results say so."""
    pretrain(folder, tmp_path, "--forgetting_target_loss", 0.01)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["forgetting"] is None and "does not reach the target in 4 steps" in caplog.text
    points = points_of(json.loads((tmp_path / "forgetting_frontier.json").read_text()))
    assert [point.step for point in points] == [0, 2, 4]
    assert results["forgetting_pretraining_loss_before"] == points[0].pretraining_loss
    assert points[0].pretraining_loss == pytest.approx(results["eval_loss"], rel=1e-5)
    target = (points[1].finetuning_loss + points[2].finetuning_loss) / 2
    pretrain(folder, tmp_path, "--forgetting_target_loss", target, "--overwrite_output_dir")
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["forgetting"] == at_target(points, target).pretraining_loss - points[0].pretraining_loss
    assert results["forgetting_steps"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--forgetting_max_steps 3", ["forgetting_max_steps=3", "no effect", "final_forgetting=None"]),
        ("--final_forgetting @second.txt", ["final_forgetting=", "Give forgetting_target_loss"]),
        ("--final_forgetting @first.txt --forgetting_target_loss 3", ["these are the pretraining data"]),
        ("--final_forgetting @none --forgetting_target_loss 3", ["final_forgetting=", "could not be loaded"]),
        ("--final_forgetting @second.txt --forgetting_target_loss 0", ["forgetting_target_loss=0", "more than 0"]),
    ],
)
def test_bad_inputs_of_pretraining(flags, words, folder, tmp_path):
    argv = [word.replace("@", f"{folder}/") for word in flags.split()]
    first = ("--dataset_name", folder / "first.txt", "--vocab_size", 300, "--block_size", 16, "--use_cpu")
    check(load_script("pretrain_llama").main, [*first, "--output_dir", tmp_path, *argv], *words)


def test_an_image_classifier_is_refused(folder, tmp_path):
    shutil.copytree(folder / "run-0", tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    words = ("checkpoint=", "is an image classifier", "Give a causal language model")
    check(load_script("evaluate_forgetting").main, [tmp_path / "vit", *arguments(folder)], *words)
