"""The scripts for language models as users start them: the chain from raw text to a model that answers, offline."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from helpers import SCRIPTS
from helpers.scripts import launch, load_script
from hf_gr.cli import command
from hf_gr.cli.shipped import RECIPES
from hf_gr.reporting.card import ENVIRONMENT, python_string
from hf_gr.reporting.record import read_record

TEXT = "\n\n".join(f"line {i}: the quick brown fox jumps over {i % 11} lazy dogs and {i % 5} cats." for i in range(600))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    rows = {
        "instruction": [f"How many dogs does the fox jump over in line {i}?" for i in range(40)],
        "input": ["" if i % 2 else "Count well." for i in range(40)],
        "output": [f"{i % 11} dogs." for i in range(40)],
    }
    Dataset.from_dict(rows).to_parquet(folder / "instructions.parquet")
    holes = {"instruction": [None, "Say nothing."], "input": ["", ""], "output": ["Nothing.", " "]}
    Dataset.from_dict({name: rows[name] + holes[name] for name in rows}).to_parquet(folder / "with_holes.parquet")
    questions = {"context": ["the quick brown"] * 3, "choices": [[" fox", " cats"]] * 3, "label": [0, 0, 0]}
    Dataset.from_dict(questions).to_parquet(folder / "questions.parquet")
    return {"text": folder / "text.txt", "instructions": folder / "instructions.parquet",
            "with_holes": folder / "with_holes.parquet",
            "questions": folder / "questions.parquet"}  # fmt: skip


PRETRAIN = ("--vocab_size", 400, "--eval_documents", 20, "--max_steps", 6,
            "--per_device_train_batch_size", 4, "--learning_rate", 3e-3, "--logging_steps", 1, "--report_to", "none",
            "--gr_lambda", 0, "--ire_kappa", 1, "--ire_interval", 2, "--ire_start_step", 2)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "llama"
    printed = launch("--dataset_name", data["text"], "--output_dir", folder, *PRETRAIN, "--save_steps", 3,
                     "--sample_prompt", "line", script="pretrain_llama.py")  # fmt: skip
    return folder, printed


@pytest.fixture(scope="module")
def adapters(data, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "lora"
    printed = launch("--model_name_or_path", pretrained[0], "--dataset_name", data["with_holes"], "--output_dir",
                     folder, "--skip_bad_examples", True, "--num_train_epochs", 2, "--eval_examples", 8,
                     "--generate_samples", 2, "--max_new_tokens", 5, "--learning_rate", 1e-3,
                     "--gr_warmup", "none", "--merge_and_save", True, "--logging_steps", 1,
                     "--gradient_accumulation_steps", 1, script="finetune_llama_lora.py")  # fmt: skip
    return folder, printed


def test_pretraining_ends_in_a_model_a_card_and_a_picture(pretrained):
    folder, printed = pretrained
    results = json.loads((folder / "all_results.json").read_text())
    assert (
        "Method: optim=adamw_torch_fused, no GR, IRE with kappa=1, gamma=0.6; up to 1.5 passes per step.\n" in printed
    )
    assert f"Perplexity {results['eval_perplexity']:.2f}" in printed
    assert results["train_tokens"] == 6 * 4 * 256
    assert results["train_passes"] == 6 + 2
    for name in ("model.safetensors", "tokenizer.json", "curves.png"):
        assert (folder / name).exists()
    card = (folder / "README.md").read_text()
    assert "`LlamaForCausalLM` with" in card and "with IRE" in card
    assert "trained from scratch on the local file text.txt" in card
    assert "| perplexity |" in card and "## Sample" in card and "split `20 documents of train`" in card
    assert "6 optimizer steps, 6 forward and backward passes over a batch of 4 examples and 2 over it for IRE" in card


# ---- Recipes and flags ----

QUIET = ["--use_cpu", "--report_to", "none"]


def parsed(name: str, *argv):
    """(model, data, training arguments) as script NAME has them."""
    required = ["--model_name_or_path", "base"] if name == "finetune_llama_lora" else []
    return load_script(name).parse_args([*map(str, argv), *required, *QUIET])


def method(name: str, *argv) -> str:
    return parsed(name, *argv)[2].describe_method()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("pretrain_llama", "no GR, IRE with kappa=4, gamma=0.6; up to 1.1 passes per step"),
        ("finetune_llama_lora", "GR with r=0.05, lambda=0.05, gr_warmup=zero, no IRE; up to 2 passes per step"),
        ("train_vit", "GR with r=0.02, lambda=0.02, gr_warmup=zero, no IRE; up to 2 passes per step"),
    ],
)
def test_the_method_is_the_same_whatever_the_data(script, expected, tmp_path):
    (tmp_path / "data.yaml").write_text("dataset_name: other\noutput_dir: out\n")
    for argv in ([], ["--dataset_name", "other"], ["--dataset-name=other"], [tmp_path / "data.yaml"]):
        assert method(script, *argv) == f"optim=adamw_torch_fused, {expected}"
    assert parsed(script, "--dataset_name", "other")[2].per_device_train_batch_size == 8  # the rest is not the recipe's


def test_a_recipe_that_says_something_of_the_method_says_all_of_it(tmp_path):
    (tmp_path / "r.yaml").write_text("dataset_name: other\ngr_r: 0.05\noutput_dir: out\n")
    assert "GR with r=0.05, lambda=0.05" in method("pretrain_llama", tmp_path / "r.yaml")


def test_adamw_alone_makes_one_pass_a_step(tmp_path):
    alone = method("pretrain_llama", "--dataset_name", "other", "--ire_kappa", 0)
    assert alone == "optim=adamw_torch_fused, no GR, no IRE; 1 pass per step"


RECIPE = {
    "output_dir": "out",
    "max_train_tokens": 1000,
    "vocab_size": 300,
    "ire_kappa": 4.0,
    "ire_gamma": 0.7,
    "gr_lambda": 0,
    "optim": "tvlars",
    "optim_args": "tv_lambda=1,delay_steps=0.5",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
    "bf16": True,
    "dataset_name": "python",
    "dataset_config_name": "small",
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max_steps", 12], {"max_steps": 12, "max_train_tokens": None}),
        (["--num_train_epochs", 2], {"num_train_epochs": 2, "max_train_tokens": None, "max_steps": -1}),
        (["--max_train_tokens", 5], {"max_train_tokens": 5}),
        (["--tokenizer_name", "gpt2"], {"tokenizer_name": "gpt2", "vocab_size": None}),
        (["--ire_preset", "cnn"], {"ire_kappa": 1.0, "ire_gamma": 0.9}),
        (["--ire_preset", "cnn", "--ire_kappa", 0], {"ire_kappa": 0.0, "ire_gamma": 0.9}),
        (["--optim", "lamb"], {"optim": "lamb", "optim_args": None}),
        (["--optim", "tvlars"], {"optim": "tvlars", "optim_args": "tv_lambda=1,delay_steps=0.5"}),
        (["--lr_scheduler_type", "linear"], {"lr_scheduler_kwargs": None}),
        (["--bf16", "False", "--fp16", "False"], {"bf16": False, "fp16": False}),
        (["--dataset_name", "x"], {"dataset_name": "x", "dataset_config_name": None}),
    ],
    ids=str,
)
def test_a_flag_beats_the_recipe_and_what_contradicts_it_there(flags, expected, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RECIPE))
    parts = parsed("pretrain_llama", tmp_path / "r.json", *flags)
    found = {name: value for part in parts for name, value in vars(part).items()}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", 3, "--num_train_epochs", 2], "max_steps=3 and num_train_epochs=2.0 both set the length"),
        (["--gr_r", 0.1], "gr_r=0.1 has no effect with gr_lambda=0 in the recipe. Give gr_lambda, too"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed("pretrain_llama", *flags)


def test_pretraining_resumes_bit_identically(data, pretrained, tmp_path):
    folder, _ = pretrained
    launch("--dataset_name", data["text"], "--output_dir", tmp_path, *PRETRAIN, "--resume_from_checkpoint",
           folder / "checkpoint-3", script="pretrain_llama.py")  # fmt: skip
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_stream_resumes_with_the_right_next_batch(data, tmp_path):
    flags = ("--dataset_name", data["text"], *PRETRAIN, "--streaming", True, "--tokenizer_name")
    tokenizer = tmp_path / "tokenizer"
    from hf_gr.data.text import train_tokenizer

    train_tokenizer(TEXT.split("\n\n"), 400, 256).save_pretrained(tokenizer)
    flags = tuple(flag for i, flag in enumerate(flags) if "--vocab_size" not in flags[max(0, i - 1) : i + 1])
    script = "pretrain_llama.py"
    launch(*flags, tokenizer, "--output_dir", tmp_path / "whole", "--save_steps", 3, script=script)
    launch(*flags, tokenizer, "--output_dir", tmp_path / "rest", "--resume_from_checkpoint",
           tmp_path / "whole" / "checkpoint-3", script=script)  # fmt: skip
    whole, rest = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "rest"))
    assert whole == rest
    logs = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "rest")
    ]
    losses = [{entry["step"]: entry["loss"] for entry in log if "loss" in entry} for log in logs]
    assert losses[0] == losses[1] and len(set(losses[0].values())) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes(data, streaming, tmp_path):
    launch("--dataset_name", data["text"], "--output_dir", tmp_path, *PRETRAIN, "--use_cpu", "--ddp_backend", "gloo",
           "--streaming", streaming,
           processes=2, script="pretrain_llama.py")  # fmt: skip
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["train_tokens"] == 2 * 6 * 4 * 256


def test_lora_trains_the_adapters_alone(pretrained, adapters):
    folder, printed = adapters
    assert "Loss of the answers " in printed
    before, after = (json.loads((folder / f"{name}_results.json").read_text()) for name in ("before", "eval"))
    assert after["eval_loss"] < before["eval_loss"]
    counts = json.loads((folder / "train_results.json").read_text())
    assert counts["train_skipped_examples"] == 1 and counts["eval_skipped_examples"] == 0
    assert counts["train_examples_without_answer"] + counts["eval_examples_without_answer"] == 1
    assert {"eval_exact_match", "eval_rouge_l", "eval_perplexity"} <= set(after) & set(before)
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "trained from a local checkpoint" in card and "| rouge_l |" in card
    # What is merged differs from the base in the layers with adapters, by their product, and nowhere else.
    base, merged = load_file(pretrained[0] / "model.safetensors"), load_file(folder / "merged" / "model.safetensors")
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in saved:
            change = saved[f"{stem}.lora_B.weight"] @ saved[f"{stem}.lora_A.weight"] * 2
            torch.testing.assert_close(merged[name], weight + change)
        else:
            assert torch.equal(merged[name], weight)


def test_lora_on_two_processes(data, pretrained, tmp_path):
    launch("--model_name_or_path", pretrained[0], "--dataset_name", data["instructions"], "--output_dir", tmp_path,
           "--max_steps", 3, "--eval_examples", 8, "--generate_samples", 2, "--max_new_tokens", 3,
           "--gr_warmup", "none", "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
           "--ire_kappa", 1, "--ire_start_step", 0, "--logging_steps", 1, "--use_cpu", "--ddp_backend", "gloo",
           processes=2, script="finetune_llama_lora.py")  # fmt: skip
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 3 and all(e["gr_lambda"] > 0 and e["ire_flat_fraction"] > 0.5 for e in steps)
    assert "batch of 8 examples" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("merged", [False, True])
def test_the_result_answers_in_a_pipeline(adapters, merged):
    folder = adapters[0] / "merged" if merged else adapters[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    written = answer("### Instruction:\nHow many dogs?\n\n### Response:\n", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("### Instruction:")


def test_the_code_on_the_cards_runs(pretrained, adapters, tmp_path, monkeypatch, capsys):
    """The card of these adapters has none, because their base is a folder; what it would have is run all the same."""
    monkeypatch.chdir(tmp_path)
    Path(pretrained[0].name).symlink_to(pretrained[0])
    exec((pretrained[0] / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert "```python" not in (adapters[0] / "README.md").read_text()
    usage = ENVIRONMENT.get_template("card_usage.md").module.usage
    model = read_record(adapters[0]).model
    exec(usage("text-generation", python_string(str(adapters[0])), model, has_base=True), {})
    assert capsys.readouterr().out.count("'generated_text': 'Some text") == 2


def test_multiple_choice(data, pretrained, capsys):
    load_script("evaluate_llama").main(
        [str(pretrained[0]), "--dataset_name", str(data["questions"]), "--device", "cpu"]
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["examples"] == 3 and 0 <= printed["accuracy"] <= 1
    assert json.loads((pretrained[0] / "evaluation.json").read_text()) == printed


def test_the_harness_is_given_the_folder(adapters, pretrained, monkeypatch, tmp_path, capsys):
    """A stand-in for lm_eval, which is not installed: what it is asked for."""
    (tmp_path / "lm_eval.py").write_text("def simple_evaluate(**kwargs):\n    return {'results': kwargs}\n")
    monkeypatch.syspath_prepend(tmp_path)
    argv = [str(adapters[0]), "--lm_eval_tasks", "arc_easy", "--device", "cpu", "--max_examples", "9"]
    load_script("evaluate_llama").main(argv)
    asked = json.loads(capsys.readouterr().out)
    assert asked == {
        "model": "hf",
        "model_args": f"pretrained={pretrained[0]},peft={adapters[0]}",
        "tasks": ["arc_easy"],
        "device": "cpu",
        "limit": 9,
    }
    sys.modules.pop("lm_eval", None)


def test_comparison_of_runs(pretrained, capsys, tmp_path):
    folder = str(pretrained[0])
    command.main(["speedup", "--baseline", folder, "--candidate", folder, "--picture", str(tmp_path / "c.png")])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("|")[1].strip() for line in lines if line.startswith("| ") and "1.00" in line} == {
        "steps",
        "tokens",
        "passes",
        "seconds",
    }
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain_llama", ["--block_size", "512"], "block_size=512: llama-tiny has a context of 256 tokens"),
        ("pretrain_llama", ["--tokenizer_name", "x", "--vocab_size", "300"], "vocab_size=300 has no effect with"),
        ("pretrain_llama", ["--streaming", "True"], "streaming=True: a stream has no known length"),
        ("pretrain_llama", ["--text_column_name", "body"], "text_column_name='body' is not a column of the dataset"),
        ("pretrain_llama", ["--dataset_name", "EMPTY"], "could not be loaded"),
        ("pretrain_llama", ["--dataset_config_name", "x"], "dataset_config_name='x': a file has no configurations"),
        (
            "pretrain_llama",
            ["--streaming", "True", "--max_steps", "2", "--preprocessing_num_workers", "2"],
            "preprocessing_num_workers=2 has no effect with streaming=True",
        ),
        (
            "finetune_llama_lora",
            ["--adapter_name_or_path", "OTHER", "--lora_r", "4"],
            "lora_r=4 has no effect with adapter_name_or_path=",
        ),
        ("finetune_llama_lora", ["--max_length", "9999"], "max_length=9999: the model has a context of 256 tokens"),
        ("finetune_llama_lora", ["--dataset_name", "TEXT"], "It needs 'instruction' and 'output'"),
        ("finetune_llama_lora", ["--adapter_name_or_path", "OTHER"], "does not fit"),
        ("finetune_llama_lora", ["--model_name_or_path", "MISMATCH"], "They do not belong together"),
        ("evaluate_llama", ["--lm_eval_tasks", "arc_easy"], "the lm-evaluation-harness is not installed"),
    ],
)
def test_mistakes_are_named(script, arguments, message, data, pretrained, adapters, tmp_path):
    if "EMPTY" in arguments:
        (tmp_path / "empty.txt").write_text("")
    if "OTHER" in arguments:
        other_adapter(tmp_path / "other")
    if "MISMATCH" in arguments:
        mismatch(pretrained[0], tmp_path / "mismatch")
    places = {"EMPTY": tmp_path / "empty.txt", "TEXT": data["text"], "OTHER": tmp_path / "other",
              "MISMATCH": tmp_path / "mismatch"}  # fmt: skip
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    if script == "pretrain_llama":
        defaults = {"--dataset_name": data["text"], "--output_dir": tmp_path / "out"}
    elif script == "finetune_llama_lora":
        defaults = {"--dataset_name": data["instructions"], "--model_name_or_path": pretrained[0],
                    "--output_dir": tmp_path / "out"}  # fmt: skip
    else:
        defaults = {}
        arguments = [str(pretrained[0]), *arguments] if script == "evaluate_llama" else arguments
    for flag, value in defaults.items():
        if flag not in arguments:
            arguments += [flag, str(value)]
    with pytest.raises(ValueError) as error:
        load_script(script).main([*arguments, *(["--use_cpu", "--report_to", "none"] if defaults else [])])
    assert message in str(error.value)


def other_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from hf_gr.models.presets import create_llama

    model = create_llama("llama-mini", 400)
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)


def mismatch(base: Path, folder: Path) -> None:
    from hf_gr.data.text import train_tokenizer
    from hf_gr.models.presets import create_llama

    create_llama("llama-tiny", 300).save_pretrained(folder)
    train_tokenizer([str(i) for i in range(3000)], 600, 256).save_pretrained(folder)


def test_recipes_parse():
    module = load_script("pretrain_llama")
    for recipe in RECIPES.glob("llama_*.yaml"):
        model, data, args = module.parse_args([str(recipe), "--use_cpu", "--bf16", "False", "--report_to", "none"])
        assert model.model.startswith("llama-") and data.dataset_name and args.gr_lambda == 0


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        load_script(script).main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage:")
    assert load_script(script).__doc__.strip().splitlines()[-1] in printed
