"""The model card and its metadata for the Hub, from the files in a run's folder.

This module selects the facts; the wording is in `card_template.md` and `card_usage.md`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..config import BASE_BATCH_SIZE
from ..errors import extra
from ..optim import IRE, OPTIMIZERS
from ..optim.ascents import ASCENTS, MSAM_CITATION, Ascent
from ..optim.gr_warmup import GR_WARMUPS
from ..optim.gradient_regularization import CITATION
from ..optim.gradient_reuse import CITATION as REUSE_CITATION
from ..optim.radius_rules import RADIUS_RULES
from ..optim.second_passes import SECOND_PASSES
from .plots import PICTURE, plot_curves
from .record import (
    FILE,
    History,
    Log,
    ModelFacts,
    Publication,
    Record,
    Span,
    evaluation_prefix,
    last_entry,
    last_evaluation,
    log_of,
    read_record,
)

with extra("report"):
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

#: Where the Hub looks for the results to show on a dataset's leaderboard.
EVAL_RESULTS = Path(".eval_results") / "hf_gr.yaml"
#: The first of these that was measured goes on a leaderboard.
HEADLINE_METRICS = ("accuracy", "perplexity", "loss")

PIPELINE_TAGS = {
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForMaskedLM": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
SPEED_METRICS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "jit_compilation_time",
    "model_preparation_time",
)

Entry = TypeVar("Entry")
#: Flag -> its symbol in the equations.
SYMBOLS = {
    "gr_r": "r",
    "gr_lambda": "lambda",
    "gr_warmup_steps": "T_w",
    "gr_reuse": "alpha",
    "gr_momentum_r": "r_m",
    "gr_r_max": "r_max",
} | {f"ire_{name}": symbol for name, symbol in IRE.symbols.items()}
#: Settings that a segment omits because they have no effect, not because they are at their defaults.
WITHOUT_DEFAULT = ("gr_warmup_steps", "ire_gamma")


@dataclass(frozen=True)
class Evaluation:
    """The last evaluation in the log.

    Attributes:
        metrics: name without `eval_` or `test_` -> value.
        examples: name of a dataset -> the number of examples; empty if not recorded.
        step: the training step after which it ran, out of `max_steps`.
        best_checkpoint: the checkpoint whose weights it used, if the best one was loaded after training.
    """

    metrics: dict[str, float]
    examples: dict[str, int]
    step: int
    max_steps: int
    best_checkpoint: str | None


def write_card(folder: str | Path) -> None:
    """Write `README.md` and `curves.png` into the folder of a run, and `.eval_results/hf_gr.yaml` if its dataset is on
    the Hub.

    Reads `run.json` there. If `create_model_card` was not called, the log is not in it and is read from
    `trainer_state.json` in the folder or in its last checkpoint.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder}: there is no {FILE}. Give the output folder of a run of hf_gr.")
    log = log_of(record, folder)
    record = replace(record, publication=_completed(record, folder))
    evaluation = evaluation_of(record, log)
    if has_curves(log.history):
        plot_curves(log.history, folder / PICTURE)
    _write_eval_results(folder, record.publication, evaluation.metrics)
    clips = [s.settings.get("gr_clip", 0) != 0 for s in record.segments_with("gr_lambda")]
    text = ENVIRONMENT.get_template("card_template.md").render(
        metadata=metadata(record, evaluation.metrics).to_yaml(),
        record=record,
        published=record.publication,
        evaluation=evaluation,
        picture=PICTURE if has_curves(log.history) else None,
        methods=methods_of(record),
        is_sam=is_sam(record),
        ascents=used(record, "gr_ascent", ASCENTS),
        radius_rules=used(record, "gr_radius_rule", RADIUS_RULES),
        second_passes=used(record, "gr_second_pass_kind", SECOND_PASSES),
        clips=any(clips),
        clips_always=all(clips),
        warmups=used(record, "gr_warmup", GR_WARMUPS),
        ire_method=IRE,
        own_optimizer=own_optimizer(record),
        citations=citations(record),
        gr_rows=method_rows(record, "gr_lambda"),
        ire_rows=method_rows(record, "ire_kappa"),
        hyperparameters=hyperparameters(record),
        base_batch_size=BASE_BATCH_SIZE,
    )
    ModelCard(text).save(folder / "README.md")


def _completed(record: Record, folder: Path) -> Publication:
    """The publication facts, with a default for the name and the task."""
    published = record.publication
    return replace(
        published,
        model_name=published.model_name or folder.resolve().name,
        task=published.task or _pipeline_tag(record.model),
    )


def _pipeline_tag(model: ModelFacts | None) -> str | None:
    return next((tag for suffix, tag in PIPELINE_TAGS.items() if model and model.class_name.endswith(suffix)), None)


def has_curves(history: History) -> bool:
    """Whether the log contains a training loss to plot. (A picture in the folder may be from an earlier run.)"""
    return any("loss" in entry for entry in history)


# ---- The last evaluation ----


def evaluation_of(record: Record, log: Log) -> Evaluation:
    """The last evaluation; an `Evaluation` without metrics if there was none."""
    history, names = log.history, record.evaluated or [""]
    entries = last_evaluation(history, len(names))
    counts = [int(entry["evaluated_examples"]) for entry in entries if "evaluated_examples" in entry]
    is_counted = record.evaluated is not None and len(counts) == len(entries) == len(names)
    prefix = evaluation_prefix(history)
    index = last_entry(history, prefix)
    loads_best = record.segments[-1].settings.get("load_best_model_at_end", False)
    is_of_best = loads_best and index > last_entry(history, "train_runtime")
    return Evaluation(
        metrics={name: value for entry in entries for name, value in _metrics(entry, prefix)},
        examples=dict(zip(names, counts, strict=True)) if is_counted else {},
        step=int(history[index]["step"]) if index >= 0 else 0,
        max_steps=log.max_steps,
        best_checkpoint=log.best_checkpoint if is_of_best else None,
    )


def _metrics(entry: dict[str, float], prefix: str) -> list[tuple[str, float]]:
    """The metrics, loss first; `trainer_state.json` lists them in alphabetical order."""
    names = [name for name in entry if name.startswith(prefix) and not name.endswith(SPEED_METRICS)]
    names.sort(key=lambda name: not name.endswith("loss"))
    return [(name.removeprefix(prefix), entry[name]) for name in names]


# ---- The methods and settings ----


def methods_of(record: Record) -> dict[str, str]:
    """Tag -> name of each method that the run used in any step."""
    methods = {}
    if record.segments_with("gr_lambda"):
        methods["gradient-regularization"] = "gradient regularization"
    if record.segments_with("ire_kappa"):
        methods["ire"] = "IRE"
    if (optimizer := own_optimizer(record)) is not None:
        methods[optimizer.__name__.lower()] = optimizer.__name__
    return methods


def own_optimizer(record: Record) -> Any:
    """The class of the run's optimizer, if it is one of `OPTIMIZERS`, whose equations the card shows."""
    name = record.method.get("optimizer")
    return next((kind for kind in OPTIMIZERS.values() if kind.__name__ == name), None)


def used(record: Record, flag: str, table: dict[str, Entry]) -> list[Entry]:
    """The entries of a table of GR that the run used; the first is the default, which settings may leave out."""
    names = [s.settings.get(flag, next(iter(table))) for s in record.segments_with("gr_lambda")]
    return [table[name] for name in dict.fromkeys(names) if name in table]


def is_sam(record: Record) -> bool:
    segments = record.segments_with("gr_lambda")
    is_along_gradient = used(record, "gr_ascent", ASCENTS) == [ASCENTS["gradient"]]
    is_full = used(record, "gr_second_pass_kind", SECOND_PASSES) == [SECOND_PASSES["full"]]
    return is_along_gradient and is_full and all(s.settings["gr_lambda"] == s.settings["gr_r"] for s in segments)


def is_cited(ascent: Ascent, record: Record) -> bool:
    """GR takes its second gradient along the first, as SAM does, but is SAM only for lambda = r."""
    return ascent is not ASCENTS["gradient"] or is_sam(record)


def citations(record: Record) -> list[str]:
    """The BibTeX of the methods that the run used."""
    optimizer = own_optimizer(record)
    return [
        *([CITATION] if record.segments_with("gr_lambda") else []),
        *(entry.citation for entry in used(record, "gr_ascent", ASCENTS) if is_cited(entry, record)),
        *(rule.citation for rule in used(record, "gr_radius_rule", RADIUS_RULES) if rule.citation),
        *(kind.citation for kind in used(record, "gr_second_pass_kind", SECOND_PASSES) if kind.citation),
        *([REUSE_CITATION] if record.total("reused_steps") else []),
        *([MSAM_CITATION] if record.total("momentum_steps") else []),
        *([IRE.citation] if record.segments_with("ire_kappa") else []),
        *([optimizer.citation] if optimizer is not None else []),
    ]


def method_rows(record: Record, degree: str) -> list[tuple[str, str, list[Span]]]:
    """(flag, symbol, values) of a method: its degree over all steps, its other flags over those with the method on.

    Args:
        degree: the flag that turns the method off at 0, `gr_lambda` or `ire_kappa`.
    """
    segments = record.segments_with(degree)
    names = dict.fromkeys(name for s in segments for name in s.settings if name.startswith(degree.split("_")[0] + "_"))
    rows = []
    for name in names:
        relevant = [s for s in segments if name in s.settings or name not in WITHOUT_DEFAULT]
        rows.append((name, SYMBOLS.get(name, ""), record.setting(name, None if name == degree else relevant)))
    return rows


def hyperparameters(record: Record) -> dict[str, list[Span]]:
    """The arguments that were not always at their defaults. Those of GR and IRE have their own tables."""
    rows = {name: [Span(value, 0, 0)] for name, value in record.publication.arguments.items()}
    names = dict.fromkeys(name for segment in reversed(record.recorded) for name in segment.settings)
    return rows | {name: record.setting(name) for name in names if not name.startswith(("gr_", "ire_"))}


# ---- What the Hub reads ----


def metadata(record: Record, metrics: dict[str, float]) -> ModelCardData:
    published = record.publication
    return ModelCardData(
        language=published.language,
        license=published.license,
        library_name="peft" if record.model and record.model.adapter else "transformers",
        pipeline_tag=published.task,
        tags=sorted({"hf_gr", "generated_from_trainer", *methods_of(record), *published.tags}),
        datasets=published.dataset_ids or None,
        base_model=published.base_model,
        metrics=list(metrics) or None,
        model_name=published.model_name,
        eval_results=_eval_results(published, metrics) or None,
    )


def _eval_results(published: Publication, metrics: dict[str, float]) -> list[EvalResult]:
    """The results as the Hub indexes them, which requires a task and a dataset on the Hub."""
    if not (published.task and published.dataset_ids):
        return []
    return [
        EvalResult(
            task_type=published.task,
            dataset_type=published.dataset_ids[0],
            dataset_name=published.dataset_names[0],
            dataset_config=published.dataset_config,
            dataset_split=published.split or None,
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def _write_eval_results(folder: Path, published: Publication, metrics: dict[str, float]) -> None:
    """The newer format: a file with one number for one dataset on the Hub. Removes that of an earlier run."""
    path = folder / EVAL_RESULTS
    metric = next((name for name in HEADLINE_METRICS if name in metrics), None)
    if metric is None or len(published.dataset_ids) != 1:
        path.unlink(missing_ok=True)
        return
    entry = EvalResultEntry(
        dataset_id=published.dataset_ids[0],
        task_id=published.dataset_config or "default",
        value=metrics[metric],
        date=published.date,
        notes=metric + (f", split {published.split}" if published.split else ""),
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


# ---- Literal text ----

#: Markdown syntax. Underscores within a word are literal, and so are brackets without an address.
_MARKDOWN = re.compile(r"[\\`*|#$~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=\()|<(?=[A-Za-z/!?])")


def md(text: Any) -> str:
    """Text to be shown literally in a sentence, a heading or a table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


def in_code(text: str) -> str:
    """Text between single backticks."""
    return one_line(text.replace("`", "'"))


def quoted(text: str) -> str:
    """Text for a code block, without the fence that would end it."""
    return text.replace("```", "` ` `")


def python_string(text: str) -> str:
    """A Python string literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\x60") + '"'


def as_tuple(value: Any) -> Any:
    """Restore the tuples in optimizer settings, which JSON turns into lists."""
    return tuple(value) if isinstance(value, list) else value


def _environment() -> Environment:
    """For templates whose blocks are on lines of their own."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters = (md, one_line, in_code, quoted, python_string, as_tuple)
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters |= {"number": lambda value, form=",": format(value, form), "url": quote}
    return environment


ENVIRONMENT = _environment()
