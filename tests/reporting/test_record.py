"""The card is a function of the folder: old runs get the cards that they had, and a card can be made again."""

import difflib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import ROOT, toys
from hf_gr.reporting.card import write_card
from hf_gr.reporting.record import (
    ModelFacts,
    OptimizerFacts,
    Publication,
    Record,
    Segment,
    read_record,
    write_record,
)

#: Output folders of runs by commit 863ad68, whose records had no more than counts and settings.
RUNS = ROOT / "tests" / "fixtures" / "runs"
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False, "capturable": False,
         "differentiable": False, "fused": True, "decoupled_weight_decay": True}  # fmt: skip
VIT = ModelFacts("ViTForImageClassification", 5_428, 5_428, is_new=True, has_processor=True)
DIGITS = Publication(task="image-classification", dataset_names=["scikit-learn digits"], split="test")
#: What today's records have besides, as the live trainer knew it: folder -> fields of `Record`.
FACTS = {
    "vit-gr": {
        "model": replace(VIT, parameters=202_698, trainable_parameters=202_698),
        "optimizer": OptimizerFacts(ADAMW),
        "peak_memory_bytes": 0.59 * 2**30,
        "publication": replace(DIGITS, model_name="vit-gr", license="apache-2.0"),
    },
    "resnet-tvlars": {
        "model": ModelFacts("CifarResNetForImageClassification", 11_173_962, 11_173_962, is_new=True, has_code=True,
                            has_processor=True),
        "optimizer": OptimizerFacts(
            {"momentum": 0.9, "trust_coefficient": 0.001, "nesterov": False, "exclude_1d": True, "bias_lr_scale": 1.0,
             "foreach": False, "tv_lambda": 1.25, "delay_steps": 4.0, "alpha": 1.0, "gamma_min": 0.001,
             "phi_everywhere": True},
            phi=[0.978, 0.007693],
            lr_factor=0.0625,
        ),
        "peak_memory_bytes": 0.73 * 2**30,
        "layer_picture": "layer_statistics.png",
        "publication": replace(DIGITS, model_name="resnet-tvlars"),
    },
    "llama-admire": {
        "model": ModelFacts("LlamaForCausalLM", 1_832_640, 1_832_640, is_new=True, has_processor=True),
        "optimizer": OptimizerFacts({**ADAMW, "betas": (0.9, 0.95)}),
        "peak_memory_bytes": 1.22 * 2**30,
        "ire_flat_fractions": {"embedding": 0.0, "attention": 0.61, "mlp": 0.63, "norm": 0.48},
        "publication": Publication(model_name="llama-admire", task="text-generation", split="validation",
                                   dataset_names=["the source of Python's standard library"]),
    },
    "lora-gr": {
        "model": ModelFacts("LlamaForCausalLM", 1_838_784, 6_144, has_processor=True,
                            adapter={"type": "LORA", "rank": 2, "alpha": 16, "modules": ["q_proj", "v_proj"]}),
        "optimizer": OptimizerFacts(ADAMW),
        "peak_memory_bytes": 0.59 * 2**30,
        "publication": Publication(model_name="lora-gr", task="text-generation", split="2 documents of train",
                                   dataset_names=["the local file instructions.jsonl"], has_local_base=True),
    },
    "resumed": {
        "model": VIT,
        "optimizer": OptimizerFacts(ADAMW),
        "peak_memory_bytes": 0.52 * 2**30,
        "defaults": {"max_grad_norm": 1.0, "gradient_accumulation_steps": 1},
        "publication": replace(DIGITS, model_name="vit-noise", language="en", license="mit", tags=["noise"],
                               base_model="somebody/vit", dataset_names=["random pixels"],
                               dataset_ids=["somebody/pixels"], dataset_config="small", arguments={"noise": 0.1}),
    },
    "sam-ire-micro": {
        "model": VIT,
        "optimizer": OptimizerFacts(ADAMW, lr_factor=0.176777),
        "peak_memory_bytes": 0.52 * 2**30,
        "evaluated": ["near", "far"],
        "ire_flat_fractions": {"embedding": 0.62, "attention": 0.69, "mlp": 0.53, "head": 0.0, "norm": 0.35},
        "ire_reduced_kappa": 1.0,
        "publication": Publication(model_name="sam-ire-micro"),
    },
}  # fmt: skip
#: What may differ from the old card: folder -> lines of a diff, and the reason.
DIFFERENCES = {
    # The old record has no log, and trainer_state.json has its keys in alphabetical order: only the loss comes first.
    "lora-gr": ["-- exact_match", "+- exact_match", "-| exact_match | 0 |", "+| exact_match | 0 |"],
}


#: What is written otherwise in every card since there is more than one ascent.
DIRECTION = {
    "at theta + r g1/||g1||.": "at theta + r d.",
    r"\theta + r_t \frac{g_1}{\|g_1\|}\right)$$": "\\theta + r_t\\, d\\right)$$\n\n$$d = \\frac{g_1}{\\|g_1\\|}$$",
}


def between(text: str, start: str, end: str) -> str | None:
    return text.split(start)[1].split(end)[0] if start in text else None


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.iterdir()))
def test_old_runs_get_the_cards_that_they_had(name, tmp_path):
    folder = shutil.copytree(RUNS / name, tmp_path / name)
    old = (folder / "README.md").read_text()
    facts = {"evaluated": [""], "device": "CPU", **FACTS[name]}
    facts["publication"] = replace(
        facts["publication"],
        sample=between(old, "drawn at the end of the run.\n\n```\n", "\n```"),
        command=between(old, "```bash\n", "\n```"),
    )
    write_record(replace(read_record(folder), **facts), folder)
    write_card(folder)
    new = (folder / "README.md").read_text()
    for before, now in DIRECTION.items():
        old = old.replace(before, now)
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[2:]
    assert sorted(line for line in diff if not line.startswith("@@")) == sorted(DIFFERENCES.get(name, []))
    assert old.endswith("\n") == new.endswith("\n")


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.iterdir()))
def test_a_card_leaves_out_what_was_not_recorded(name, tmp_path):
    """The records as they are: what they have is on the card, and nothing is made up."""
    folder = shutil.copytree(RUNS / name, tmp_path / name)
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert f"\n# {name}\n\nA model, trained (" in text and "training examples)" in text
    assert "None" not in text.replace("None: `gr_lambda` was 0", "") and " parameters" not in text
    assert not any(part in text for part in ("How to use", "bash", " on CPU", "GiB", "examples), after"))
    assert "| loss |" in text or "| far_loss |" in text


def test_a_card_is_made_again_from_disk(tmp_path):
    """Byte for byte, also after the folder was moved; and so are the picture and the file of results."""
    folder, files = tmp_path / "run", ("README.md", "curves.png", ".eval_results/hf_gr.yaml")
    settings = {"ire_kappa": 2.0, "gr_r": 0.07, "gr_warmup": "r", "gr_warmup_steps": 3, "lr_scaling": "sqrt"}
    metrics = {"zeta": 1.0, "alpha": 0.5}
    trainer = toys.trainer(folder, eval_dataset=toys.images(6), compute_metrics=lambda _: dict(metrics), **settings)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(dataset_tags="somebody/pixels", sample=("a", "b"), command="python x.py --gr_r 0.07")
    first = [(folder / name).read_bytes() for name in files]
    folder = folder.rename(tmp_path / "moved")
    for name in files:
        (folder / name).unlink()
    write_card(folder)
    assert [(folder / name).read_bytes() for name in files] == first
    assert re.findall(r"^\| (\w+) \| [\d.]+ \|$", first[0].decode(), re.MULTILINE) == ["loss", "zeta", "alpha"]
    assert not (folder / "trainer_state.json").exists()  # the script's own affair
    assert str(tmp_path) not in (folder / "run.json").read_text()


def test_an_unfinished_run_gets_a_card(tmp_path):
    """From its record and the log in its last checkpoint, without `create_model_card`."""
    trainer = toys.trainer(tmp_path, gr_warmup="none", save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "4 optimizer steps, 8 forward and backward passes" in text and "`ViTForImageClassification` with" in text
    assert "The run was not evaluated." in text and "(curves.png)" in text and "`AdamW` (betas=(0.9, 0.999)" in text


@pytest.mark.parametrize(
    ("missing", "message"), [("run.json", r"there is no run\.json"), ("trainer_state.json", r"no trainer_state\.json")]
)
def test_a_card_without_a_record_or_a_log_is_refused(missing, message, tmp_path):
    folder = shutil.copytree(RUNS / "vit-gr", tmp_path / "x")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        write_card(folder)


def test_a_record_is_read_as_it_was_written_with_all_its_facts(tmp_path):
    record = Record({"gr": True}, {"train_examples": 3}, [Segment(1, 4, {"seed": 1}), Segment(5, 6, {"seed": 2})],
                    model=VIT, optimizer=OptimizerFacts({"eps": 1e-8}, phi=[1.0, 0.5]), evaluated=["a"],
                    publication=Publication(model_name="x", tags=["y"], sample="z"))  # fmt: skip
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    assert record.setting("seed") == [(1, 1, 4), (2, 5, 6)] and record.spans("world_size") == [(1, 1, 6)]


def test_a_token_in_the_command_is_not_recorded(tmp_path):
    token = "hf_" + 34 * "a"
    trainer = toys.trainer(tmp_path)
    trainer.create_model_card(command=f"python x.py --hub_token {token}")
    assert token not in (tmp_path / "run.json").read_text() + (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["publication"]["command"].endswith("--hub_token ...")
    assert not Path(tmp_path / "run.tmp").exists()


def test_what_an_optimizer_keeps_in_its_groups_does_not_stop_a_run(tmp_path):
    model = toys.vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0] |= {"owner": object(), "table": {(1, 2): 3}, "sizes": (4, 5)}
    toys.trainer(tmp_path, model, optimizers=(optimizer, None), gr_lambda=0, max_steps=2).train()
    settings = read_record(tmp_path).optimizer.settings
    assert settings["sizes"] == [4, 5] and settings["owner"].startswith("<") and settings["table"] == {}
