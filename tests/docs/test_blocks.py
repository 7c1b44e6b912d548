"""Every Python and shell block of the README and the docs, in a short form, unless a comment says why not.

Python blocks of a page run one after the other, with two training steps, and find what a reader has: a model, data and
a trainer. Commands are parsed by the parsers of what they call.
"""

import re
import shlex
import sys
import tomllib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.state import GradientState
from torch.utils.data import DataLoader

from helpers import ROOT, pages, toys
from helpers.scripts import load_script
from hf_gr import GRConfig, GRTrainer
from hf_gr.cli import command
from hf_gr.errors import ArgumentParser, Failure
from hf_gr.models.presets import VIT_PRESETS
from hf_gr.optim import OPTIMIZERS
from hf_gr.optim.ascents import ASCENTS
from hf_gr.optim.gr_warmup import GR_WARMUPS

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # no GPU, and no use_cpu
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),  # its pictures
]

TRAINING = ("train_vit", "pretrain_llama", "finetune_llama_lora", "pretrain_barlow_twins")
COMMANDS = {**dict(zip(("vit", "llama", "lora", "barlow"), TRAINING, strict=True)), "compare": "compare"}
LAUNCHERS = (["accelerate", "launch"], ["torchrun"], ["python"])


def blocks(language):
    """Those that run, as parameters of a test."""
    found = [block for page in pages.PAGES for block in pages.blocks(page, language)]
    return [pytest.param(b, id=b.name) for b in found if not b.comment.startswith("not run: ")]


class ToyForImageClassification(transformers.ViTForImageClassification):
    """For a `Trainer`, which names its inputs, and for plain loops, in which `model(x)` is the logits."""

    def __call__(self, *args, **kwargs):
        outputs = super().__call__(*args, **kwargs)
        return outputs.logits if args else outputs


def make_model() -> ToyForImageClassification:
    return ToyForImageClassification(toys.vit().config)


def loss_of(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def at_hand() -> dict:
    """The names that a block may use without defining them."""
    model, images = make_model(), toys.images(8)
    pairs = [(image["pixel_values"], image["labels"]) for image in images]
    trainer = GRTrainer(
        model_init=make_model,
        args=GRConfig(**toys.arguments("searched", max_steps=2)),
        train_dataset=images,
        eval_dataset=images,
        compute_metrics=lambda p: {"error": float((p.predictions.argmax(-1) != p.label_ids).mean())},
    )
    return {
        "model": model,
        "train_dataset": images,
        "eval_dataset": images,
        "trainer": trainer,
        "data": list(DataLoader(pairs, batch_size=2)),
        "loader": DataLoader(pairs, batch_size=2),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_of": loss_of,
    }


@pytest.fixture
def _short(tmp_path, monkeypatch):
    """In a folder of its own: trainings of two steps, searches of two trials, and no entries left in the tables."""
    train, search = transformers.Trainer.train, transformers.Trainer.hyperparameter_search

    def train_two_steps(self, *args, **kwargs):
        self.args.max_steps = 2
        return train(self, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "train", train_two_steps)
    monkeypatch.setattr(
        transformers.Trainer, "hyperparameter_search", lambda self, **kwargs: search(self, **{**kwargs, "n_trials": 2})
    )
    tables = (GR_WARMUPS, ASCENTS, OPTIMIZERS, VIT_PRESETS)
    kept = [dict(table) for table in tables]
    yield
    GradientState._reset_state()
    for table, entries in zip(tables, kept, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("page", [page for page in pages.PAGES if pages.blocks(page, "python")],
                         ids=lambda page: str(page.relative_to(ROOT)))  # fmt: skip
def test_python(page):
    scope = {**at_hand(), "__name__": "block"}
    for block in (param.values[0] for param in blocks("python") if param.values[0].page == page):
        exec(compile(block.code, block.name, "exec"), scope)


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell(block, tmp_path, monkeypatch):
    in_checkout(tmp_path, monkeypatch)
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    assert any(commands)
    for words in filter(None, commands):
        check(words)


def in_checkout(folder, monkeypatch) -> None:
    """Let a command find what it finds in a checkout, and write to `folder`."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(folder)


def check(words: list[str]) -> None:
    """Fail if the command would be refused."""
    if words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "hf-gr" and words[1] in COMMANDS:
        check_script(["python", f"scripts/{COMMANDS[words[1]]}.py", *words[2:]])
    elif words[0] == "hf-gr":
        parse(command.main, words[1:])
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
    else:
        check_script(words)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"\[(.*?)\]", " ".join(words))
    assert {extra for group in asked for extra in group.split(",")} <= set(extras)
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()


def check_script(words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    launcher, path, argv = words[:place], ROOT / words[place], [word for word in words[place + 1 :] if word != "..."]
    assert path.is_file() and any(launcher[: len(known)] == known for known in LAUNCHERS)
    assert all((ROOT / word).is_file() for word in launcher if word.endswith(".yaml"))
    if path.parent.name != "scripts":
        return
    if "--ddp_backend" in argv:  # needs the processes of its launcher
        del argv[argv.index("--ddp_backend") : argv.index("--ddp_backend") + 2]
    main = load_script(path.stem).main
    module = sys.modules[main.__module__]
    if path.stem in TRAINING:
        module.parse_args([*argv, *([] if "--use_cpu" in argv else ["--use_cpu"])])
    elif path.stem == "compare":
        with mock.patch.object(module, "run_grid"), pytest.raises(Failure, match="No run has finished"):
            main(argv)
    else:
        parse(main, argv)


class Parsed(Exception):
    pass


def parse(main, argv: list[str]) -> None:
    """Let `main` go as far as its arguments are parsed."""
    parse_args = ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    with mock.patch.object(ArgumentParser, "parse_args", stop), pytest.raises(Parsed):
        main(argv)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("accelerate launch scripts/train_vit.py --gr_radius 1", "there is no such flag"),
        ("python scripts/compare.py --preset gr-table2 --scale huge", "scale"),
        ("pip install -e .[everything]", "everything"),
        ("hf-gr plot FOLDER", "no such command"),
    ],
)
def test_a_command_that_does_not_work_is_noticed(words, why, tmp_path, monkeypatch):
    in_checkout(tmp_path, monkeypatch)
    with pytest.raises((ValueError, AssertionError), match=why):
        check(shlex.split(words))
