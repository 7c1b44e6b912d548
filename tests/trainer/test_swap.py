"""The promise of the project: a script that uses `Trainer` works with two class names replaced."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from helpers import forks, toys

SCRIPTS = Path(__file__).parent / "swap"


def swapped(script: Path, folder: Path) -> Path:
    """The script with `Trainer` and `TrainingArguments` replaced, and imported from here."""
    source = script.read_text()
    assert source.count("    Trainer,\n    TrainingArguments,\n") == 1
    source = source.replace("    Trainer,\n    TrainingArguments,\n", "")
    source = source.replace("TrainingArguments)", "GRConfig)").replace("= Trainer(", "= GRTrainer(")
    source = source.replace(
        "from transformers import (", "from hf_gr import GRConfig, GRTrainer\nfrom transformers import ("
    )
    (folder / script.name).write_text(source)
    return folder / script.name


def launch(script: Path, *flags: str, **named) -> None:
    flags = [*flags, *(part for name, value in named.items() for part in (f"--{name}", str(value)))]
    forks.run(forks.script, script, *flags)


COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "save_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "gradient_accumulation_steps": 2,
    "warmup_steps": 2,
}
GR = {
    "gr_r": 0.05,
    "gr_lambda": 0.04,
    "gr_warmup": "zero",
    "gr_warmup_steps": 3,
    "gr_scope": "global",
    "gr_interval": 1,
    "ire_kappa": 2.0,
    "ire_gamma": 0.7,
    "ire_interval": 2,
    "ire_start_step": 0,
    "ire_probe_fraction": 0.5,
}


@pytest.fixture(scope="module")
def clm(tmp_path_factory):
    """A word-level tokenizer, a small Llama's configuration, and a text."""
    folder = tmp_path_factory.mktemp("clm")
    words = [f"word{i}" for i in range(toys.VOCABULARY - 1)]
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{w: i + 1 for i, w in enumerate(words)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    toys.llama().config.save_pretrained(folder)
    generator = np.random.default_rng(0)
    for name in ("train", "validation"):
        lines = [" ".join(generator.choice(words, 12)) for _ in range(40)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return {
        "config_name": folder,
        "tokenizer_name": folder,
        "train_file": folder / "train.txt",
        "validation_file": folder / "validation.txt",
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    toys.vit().config.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / label / f"{i}.png")
    return {"model_folder": folder, "train_dir": folder / "data", "remove_unused_columns": "False"}


def logs(folder: Path) -> list[dict]:
    """Without the time that things took, and without the costs, which `GRTrainer` logs of every run."""
    state = json.loads((folder / "trainer_state.json").read_text())
    left_out = ("runtime", "per_second", "train_seconds", "train_passes", "evaluated_examples")
    return [{k: v for k, v in e.items() if not any(word in k for word in left_out)} for e in state["log_history"]]


@pytest.mark.parametrize(("name", "arguments"), [("run_clm.py", "clm"), ("run_image_classification.py", "images")])
def test_swap(name, arguments, request, tmp_path):
    flags = {**COMMON, **request.getfixturevalue(arguments)}
    stock = SCRIPTS / name
    launch(stock, "--do_train", "--do_eval", "--use_cpu", output_dir=tmp_path / "stock", **flags)

    script = swapped(stock, tmp_path)
    added = set(script.read_text().split("\n")) - set(stock.read_text().split("\n"))
    assert added and all("GRConfig" in line or "GRTrainer" in line for line in added)
    launch(script, "--do_train", "--do_eval", "--use_cpu", output_dir=tmp_path / "off", gr_lambda=0, **flags)
    assert logs(tmp_path / "off") == logs(tmp_path / "stock")

    launch(script, "--do_train", "--do_eval", "--use_cpu", output_dir=tmp_path / "gr", **flags, **GR)
    degrees = [e["gr_lambda"] for e in logs(tmp_path / "gr") if "gr_lambda" in e]
    assert degrees == [0, 0, 0, 0.04, 0.04, 0.04]
    flat = [e["ire_flat_fraction"] for e in logs(tmp_path / "gr") if "ire_flat_fraction" in e]
    assert flat == pytest.approx([0.7] * 6, abs=1e-3)
    written = {p.name for p in (tmp_path / "gr").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "curves.png", "trainer_state.json"} <= written
    assert "| `gr_warmup_steps` | T_w | 3 steps |" in (tmp_path / "gr" / "README.md").read_text()

    # Resumed from step 3, after the end of the warmup and between two choices of IRE, it ends as it did, bit for bit.
    whole = (tmp_path / "gr" / "model.safetensors").read_bytes()
    launch(script, "--do_train", "--do_eval", "--use_cpu", output_dir=tmp_path / "gr", **flags, **GR,
           resume_from_checkpoint=tmp_path / "gr" / "checkpoint-3")  # fmt: skip
    assert (tmp_path / "gr" / "model.safetensors").read_bytes() == whole
