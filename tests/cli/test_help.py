"""`--help` of the scripts: short, our flags first, each once, with the values that a run really uses."""

import re

import pytest

from helpers.scripts import load_script
from hf_gr.cli import shipped
from hf_gr.config import GRConfig


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def printed_by(name: str, capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        load_script(name).main([*argv])
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  --([\w-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["train_vit", "pretrain_llama", "finetune_llama_lora"])
def test_help_is_short_and_has_our_flags_first(name, capsys):
    text = printed_by(name, capsys, "--help")
    flags = flags_in(text)
    assert len(text.splitlines()) <= 130 and len(flags) == len(set(flags)) and not any("-" in flag for flag in flags)
    ours = [flag for flag in GRConfig.__dataclass_fields__ if flag.startswith(("gr_", "ire_"))]
    assert set(flags[: len(ours)]) == set(ours) and {"output_dir", "learning_rate", "push_to_hub"} <= set(flags)
    titles = re.findall(r"^([\w ]+):$", text, re.MULTILINE)
    assert titles == ["gradient regularization", "IRE", "optimizer", "model", "data", "this script", "training"]


def test_help_all_has_every_flag_once(capsys):
    flags = flags_in(printed_by("train_vit", capsys, "--help-all"))
    module = load_script("train_vit")
    kinds = (module.ModelArguments, module.DataArguments, module.ScriptConfig)
    every = {f.name for kind in kinds for f in kind.__dataclass_fields__.values() if f.init}
    assert set(flags) == every | {"traceback"} and len(flags) == len(set(flags))


def value_of(flag: str, text: str) -> str:
    (entry,) = re.findall(rf"^  --{flag} .*?(?=\n  --|\n\n)", text, re.MULTILINE | re.DOTALL)
    return " ".join(entry.split())


def test_values_are_those_of_the_recipe(capsys):
    default = printed_by("train_vit", capsys, "--help")
    assert value_of("gr_r", default).endswith("(recipe: 0.02)") and value_of("gr_interval", default).endswith("(1)")
    other = printed_by("train_vit", capsys, "vit_ti_cifar10.yaml", "--help")
    assert value_of("gr_r", other).endswith("(recipe: 0.1)") and value_of("seed", other).endswith("(42)")


def test_compare_lists_the_presets(capsys):
    text = printed_by("compare", capsys, "--help").split("presets:\n")[1]
    names = [line.split()[0] for line in text.splitlines()]
    assert names == sorted(path.stem for path in shipped.GRIDS.glob("*.yaml"))
    assert all(len(line) <= 125 and line.endswith((".", "?")) for line in text.splitlines())
