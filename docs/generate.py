"""Fill the generated tables of the docs: `python docs/generate.py`.

A page marks a table with two comments, `<!-- flags: gr -->` and `<!-- /flags -->`; what is between them is replaced.
`flags` are the fields of argument classes, with their help, default and choices; `entries` are the tables of methods
and presets; `costs` is the newest table of `benchmarks/costs.py` in short.
"""

import csv
import dataclasses
import importlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_gr.cli.script import ScriptConfig
from hf_gr.config import GR_PRESETS, IRE_PRESETS, GRArguments, IREArguments, OptimizerArguments
from hf_gr.models.presets import (
    CAIT_PRESETS,
    EFFICIENTNET_PRESETS,
    LLAMA_PRESETS,
    RESNET_PRESETS,
    SWIN_PRESETS,
    VIT_PRESETS,
    WIDE_RESNET_PRESETS,
)
from hf_gr.optim import OPTIMIZERS
from hf_gr.optim.fisher import HEADS
from hf_gr.reporting.arguments import default_of
from hf_gr.reporting.methods import methods_tables, table

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
SCRIPTS = {
    "vit": "train_vit",
    "llama": "pretrain_llama",
    "lora": "finetune_llama_lora",
    "barlow": "pretrain_barlow_twins",
}
#: Longer lists of choices are shown without their descriptions, and beyond the second number not in full.
DESCRIBED, LISTED = 8, 20


def argument_classes() -> dict[str, type]:
    """The dataclasses that a page can show, by the names in its comments."""
    classes: dict[str, type] = {"gr": GRArguments, "ire": IREArguments, "optimizer": OptimizerArguments}
    for name, script in SCRIPTS.items():
        module = importlib.import_module(f"hf_gr.scripts.{script}")
        classes |= {f"{name} model": module.ModelArguments, f"{name} data": module.DataArguments}
    return classes | {"script": ScriptConfig}


def flags_of(name: str) -> list[dataclasses.Field]:
    """The fields of an argument class. Of a class of `hf_gr`'s configuration only those that it adds."""
    cls = argument_classes()[name]
    is_configuration = issubclass(cls, OptimizerArguments | IREArguments)
    return [f for f in dataclasses.fields(cls) if not is_configuration or f.name in cls.__annotations__]


def flags_table(name: str) -> str:
    rows = [f"| `{f.name}` | {_default(f)} | {_description(f)} |" for f in flags_of(name)]
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])


def _default(f: dataclasses.Field) -> str:
    default = str(default_of(f))
    return "" if default in ("None", "") else f"`{default}`"


def _description(f: dataclasses.Field) -> str:
    choices = f.metadata.get("choices") or {}
    helps = {name: getattr(choices[name], "help", "") if isinstance(choices, Mapping) else "" for name in choices}
    about = [f"{name}: {text}" for name, text in helps.items() if text]
    text = f.metadata["help"].removesuffix(f" {'; '.join(about)}.")  # `_choices` shows them
    text = re.sub(r"--\w+|\b(?!hf_gr\b)\w*[a-z0-9]_[\w*]+(?:=\w+|\.[a-z]+)?", r"`\g<0>`", text)
    return f"{text}{_choices(helps)}".replace("|", r"\|")


def _choices(helps: dict[str, str]) -> str:
    if len(helps) > LISTED:
        helps = {name: text for name, text in helps.items() if text}
    is_described = len(helps) <= DESCRIBED
    words = [f"`{name}` ({text})" if is_described and text else f"`{name}`" for name, text in helps.items()]
    return f" Choices: {', '.join(words)}." if words else ""


def entries_table(name: str) -> str:
    if name in ("GR presets", "IRE presets"):
        return "\n".join(_presets(name))
    if name == "IRE heads":
        rows = (
            f"| {head.help} | {', '.join(f'`{ending}`' for ending in head.endings)} | {head.sampling} |"
            for head in HEADS.values()
        )
        return "\n".join(["| models | class names end with | labels drawn |", "|---|---|---|", *rows])
    if name == "Optimizers":  # their equations are too wide for a table
        return "\n\n".join(f"`{key}`: {cls.help}\n\n$$\n{cls.latex}\n$$" for key, cls in OPTIMIZERS.items())
    models = {"ViT": VIT_PRESETS, "Swin": SWIN_PRESETS, "CaiT": CAIT_PRESETS, "ResNet": RESNET_PRESETS}
    models |= {"Wide ResNet": WIDE_RESNET_PRESETS, "EfficientNet": EFFICIENTNET_PRESETS, "Llama": LLAMA_PRESETS}
    return table(models[name]) if name in models else methods_tables()[name]


def _presets(name: str) -> Iterator[str]:
    presets = {key: preset.flags for key, preset in GR_PRESETS.items()} if name == "GR presets" else IRE_PRESETS
    yield "| preset | sets |\n|---|---|"
    for key, flags in presets.items():
        values = (f"{value:.3g}" if isinstance(value, float) else value for value in flags.values())
        yield f"| `{key}` | {', '.join(f'`{flag}={value}`' for flag, value in zip(flags, values, strict=True))} |"


def costs_table(device: str) -> str:
    """The lines of the newest table of costs, each over all models and numbers of threads."""
    ending = {"CPU": "costs", "GPU": "gpu"}[device]
    newest = max(RESULTS.glob(f"*-{ending}.csv"), default=None)
    if newest is None:
        return f"Nothing has been measured on a {device} yet."
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in csv.DictReader(newest.read_text(encoding="utf-8").splitlines()):
        if line["against"] or line["bar"]:
            groups.setdefault(tuple(line[key] for key in ("what", "against", "bar", "unit")), []).append(line)
    rows = [f"| {' | '.join(_costs_cells(*key, lines))} |" for key, lines in groups.items()]
    source = f"[{newest.stem}](../benchmarks/results/{newest.stem}.md):\n"
    return "\n".join([source, "| | compared with | measured | bar | verdict |", "|---|---|---|---|---|", *rows])


def _costs_cells(what: str, against: str, bar: str, unit: str, lines: list[dict[str, str]]) -> Iterator[str]:
    try:
        values = sorted({f"{float(line['value']):.2f}" for line in lines}, key=float)
        measured, limit = f"{' to '.join(values[:: max(len(values) - 1, 1)])} {unit}", f"≤ {float(bar or 0):g} {unit}"
    except ValueError:  # yes, no, or not installed
        measured, limit = ", ".join(sorted({line["value"] for line in lines})), bar
    verdicts = Counter(line["verdict"] for line in lines)
    outcome = next(iter(verdicts)) if len(verdicts) == 1 else ", ".join(f"{n} {name}" for name, n in verdicts.items())
    yield from (what, against, measured.strip(), limit.strip() if bar else "", outcome)


def fill(text: str) -> str:
    """A page with its tables made anew."""
    tables = {"flags": flags_table, "entries": entries_table, "costs": costs_table}

    def replace(match: re.Match) -> str:
        opening, kind, name = match.groups()
        return f"{opening}\n{tables[kind](name)}\n<!-- /{kind} -->"

    return re.sub(r"(<!-- (flags|entries|costs): ([\w ]+) -->)\n.*?<!-- /\2 -->", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in DOCS.rglob("*.md"):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
