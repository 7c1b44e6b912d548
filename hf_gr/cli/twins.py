"""The twin of a run: the same without GR, or without IRE. Its command, and how the two compare."""

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import extra
from ..reporting.record import FILE, Record, last_evaluation, read_mapping, read_record
from ..reporting.redaction import flag_name, redact

with extra("scripts"):
    from scipy import stats


class Method(NamedTuple):
    """A method that a twin does without."""

    name: str
    flags: str  # the prefix of its flags
    off: tuple[str, str]  # the flag that turns it off

    @property
    def key(self) -> str:
        """In `Record.method`."""
        return self.name.lower()


METHODS = (Method("GR", "gr_", ("--gr_lambda", "0")), Method("IRE", "ire_", ("--ire_kappa", "0")))
#: What the twin does not take over: it has a folder of its own, and is not uploaded over its model.
OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_")
#: Metrics to compare, the first that both have; errors with an interval.
METRICS = ("test_error", "eval_error", "eval_knn_error", "eval_perplexity", "eval_loss")


def twin_command(program: list[str], argv: list[str], args: Any) -> tuple[str, str] | None:
    """(method, command) of the same run without GR or, where GR is off, without IRE; None where both are off.

    Args:
        program: the words that start the script.
        argv: its arguments.
        args: the parsed ones.
    """
    active = {"GR": args.is_active, "IRE": args.ire_kappa != 0}
    method = next((method for method in METHODS if active[method.name]), None)
    if method is None:
        return None
    folder = f"{str(args.output_dir).rstrip('/')}-without-{method.key}"
    words = [*program, *_without(argv, (method.flags, *OWN)), *method.off, "--output_dir", folder]
    return method.name, shlex.join(redact(words, known=(args.hub_token,)))


def _without(argv: list[str], prefixes: tuple[str, ...]) -> Iterator[str]:
    """`argv` without the flags that begin so, and without their values."""
    is_dropped = False
    for word in argv:
        if (name := flag_name(word)) is not None:
            is_dropped = name.removeprefix("no_").startswith(prefixes)
        if not is_dropped:
            yield word


def comparisons(folder: Path) -> Iterator[str]:
    """A line for each finished run beside `folder` that has the same settings but for one method."""
    ours = _finished(folder)
    for path in sorted(path.parent for path in folder.parent.glob(f"*/{FILE}") if path.parent != folder):
        theirs = _finished(path)
        if ours is None or theirs is None:
            continue
        for method in METHODS:
            if _are_twins(ours.record, theirs.record, method) and (line := _compare(ours, theirs, method)):
                yield line


class Finished(NamedTuple):
    """A finished run."""

    folder: Path
    record: Record
    results: dict[str, Any]

    @property
    def evaluated_examples(self) -> int:
        """0 if it is not known."""
        evaluations = last_evaluation(self.record.log.history) if self.record.log else []
        return int(evaluations[0].get("evaluated_examples", 0)) if evaluations else 0


def _finished(folder: Path) -> Finished | None:
    """None if it is not one that this version can read: a comparison must not fail the run that asks for it."""
    try:
        record, results = read_record(folder), read_mapping(folder / "all_results.json")
    except ValueError:
        return None
    return Finished(folder, record, results) if record is not None and record.publication.date else None


def _are_twins(ours: Record, theirs: Record, method: Method) -> bool:
    return ours.method.get(method.key) != theirs.method.get(method.key) and _rest(ours, method) == _rest(theirs, method)


def _rest(record: Record, method: Method) -> list[Any]:
    """What twins have in common."""
    segments = [
        {
            "settings": {name: v for name, v in segment.settings.items() if not name.startswith(method.flags)},
            "sizes": [segment.world_size, segment.batch_size],
        }
        for segment in record.segments
    ]
    distinct = {json.dumps(segment, sort_keys=True, default=str) for segment in segments}  # a resume may change them
    methods = {name: value for name, value in record.method.items() if name != method.key}
    model = record.model and (record.model.class_name, record.model.parameters, record.model.trainable_parameters)
    return [distinct, methods, model, record.data, record.publication.base_model, record.is_whole()]


def _compare(ours: Finished, theirs: Finished, method: Method) -> str | None:
    """`error 2.50 % [1.34, 4.62] with GR, 3.61 % [2.12, 6.08] without it`; None if the two have no metric in common."""
    with_, without = (ours, theirs) if ours.record.method[method.key] else (theirs, ours)
    metric = next((name for name in METRICS if name in ours.results and name in theirs.results), None)
    if metric is None:
        return None
    texts = [_text(metric, run.results[metric], run.evaluated_examples) for run in (with_, without)]
    intervals = " (95 % Wilson intervals)" if any("[" in text for text in texts) else ""
    name = metric.replace("eval_", "").replace("_", " ")
    where = f"The run {'without' if with_ is ours else 'with'} it: {theirs.folder}"
    return f"{name} {texts[0]} with {method.name}, {texts[1]} without it{intervals}. {where}"


def _text(metric: str, value: float, count: int) -> str:
    if "error" not in metric:
        return f"{value:.4g}"
    return f"{100 * value:.2f} %" + (f" [{_interval(value, count)}]" if count and math.isfinite(value) else "")


def _interval(share: float, count: int) -> str:
    low, high = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
    return f"{100 * low:.2f}, {100 * high:.2f}"
