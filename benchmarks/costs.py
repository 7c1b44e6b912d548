"""What every method costs, beside its peers, as one table: `make bench`.

    pip install -c constraints.txt -e ".[bench]" && pip install --no-deps --target outputs/peers timm torchvision
    python benchmarks/costs.py --peers outputs/peers

(timm and torchvision have a folder of their own because of what an installed torchvision does beside a CPU build of
torch; see `peers.py`. A peer that is not there leaves a row that says so.) Everything that is compared runs in one
process, interleaved in a new order each round. Rows, models and rounds are in `rows/`.
"""

import argparse
import csv
import gc
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import peers
import torch
import transformers
from comparison import Bench, Comparison, Fact, Group, Row
from provenance import ROOT, commit, load, processor, versions
from rows import GROUPS
from timing import Ratio, interleave, ratio

from hf_gr.errors import ArgumentParser, run

MET, NOT_MET, HIDDEN, MISSING = "met", "not met", "spread hides it", "not measured"
NOT_INSTALLED = "not installed"
HEADS = ("where", "threads", "what", "time", "compared with", "its time", "measured", "bar", "verdict")


class Line(NamedTuple):
    """A line of the CSV; empty where a column does not apply. `value` is a ratio, a number, or yes or no."""

    group: str
    where: str
    what: str
    threads: str = ""
    rounds: int | str = ""
    seconds: float | str = ""
    against: str = ""
    peer: str = ""
    peer_seconds: float | str = ""
    value: float | str = ""
    low: float | str = ""
    high: float | str = ""
    unit: str = ""
    bar: float | str = ""
    verdict: str = ""
    images: int | str = ""

    def cells(self) -> list[str]:
        """The line as one of the table."""
        is_ratio = isinstance(self.low, float)
        measured = str(Ratio(self.value, self.low, self.high)) if is_ratio else f"{self.value} {self.unit}".strip()
        bar = f"≤ {self.bar:g} {self.unit}".strip() if isinstance(self.bar, float) else self.bar
        against = self.against if self.peer in ("", self.against) else f"{self.against}; the fastest: {self.peer}"
        outcome = self.verdict if self.verdict in (MET, "") else f"**{self.verdict}**"
        times = [self._time(seconds) for seconds in (self.seconds, self.peer_seconds)]
        return [self.where, self.threads, self.what, times[0], against, times[1], measured, bar, outcome]

    def _time(self, seconds: float | str) -> str:
        if isinstance(seconds, str):
            return seconds
        if self.images:
            return f"{self.images / seconds:,.0f} images/s"
        return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def verdict(value: float | bool, low: float, high: float, bar: float | bool | None) -> str:
    """Whether the whole middle half keeps to the bar, or none of it does, or the bar lies inside."""
    if bar is None:
        return ""
    if isinstance(bar, bool):
        return MET if value == bar else NOT_MET
    if high <= bar:
        return MET
    return NOT_MET if low > bar else HIDDEN


# ---- Measuring ----


def measure(group: str, comparison: Comparison, options: argparse.Namespace, threads: int) -> Iterator[Line]:
    """The lines of one comparison. Facts do not depend on the threads, and come with the first number of them."""
    on_gpu = options.device == "cuda"
    rows = [row for row in comparison.rows if not (row.cpu_only and on_gpu)]
    is_first = threads == options.threads[0]
    if not rows or not (is_first or comparison.uses_threads):
        return
    rounds = options.rounds or comparison.rounds
    bench = comparison.make(options.device)
    seconds = interleave(bench.kinds, rounds, bench.before, options.device)
    for name, shares in bench.averages.items():
        parts = [[share * second for second in seconds[kind]] for kind, share in shares.items()]
        seconds[name] = [sum(turn) for turn in zip(*parts, strict=True)]
    for row in rows:
        line = line_of(Line(group, comparison.where, row.what), row, seconds, options.device)
        label = "GPU" if on_gpu else str(threads) if comparison.uses_threads else ""
        yield line._replace(threads=label, rounds=rounds, images=bench.images or "")
    if is_first:
        yield from facts_of(bench, Line(group, comparison.where, ""))


def line_of(start: Line, row: Row, seconds: dict[str, list[float]], device: str) -> Line:
    bar = row.gpu_bar if device == "cuda" and row.gpu_bar is not None else row.bar
    start = start._replace(against=row.against or row.peers[0], bar="" if bar is None else bar)
    present = [peer for peer in row.peers if peer in seconds]
    if not present or row.what not in seconds:
        return start._replace(value=NOT_INSTALLED, verdict="" if bar is None else MISSING)
    medians = {name: statistics.median(seconds[name]) for name in (row.what, *present)}
    peer = min(present, key=lambda name: medians[name])
    found = ratio(seconds, row.what, peer)
    return start._replace(
        seconds=medians[row.what],
        peer=peer,
        peer_seconds=medians[peer],
        value=found.median,
        low=found.low,
        high=found.high,
        verdict=verdict(*found, bar),
    )


def facts_of(bench: Bench, start: Line) -> Iterator[Line]:
    for fact in bench.facts:
        value = fact.measure()
        if isinstance(value, bool):
            shown, bar = "yes" if value else "no", "" if fact.bar is None else "yes"
        else:
            shown = value = rounded(value, fact)
            bar = "" if fact.bar is None else float(fact.bar)
        outcome = verdict(value, value, value, fact.bar)
        yield start._replace(what=fact.what, value=shown, unit=fact.unit, bar=bar, verdict=outcome)


def rounded(value: float, fact: Fact) -> float:
    """As many digits as mean something: an allocator rounds, too."""
    if not fact.unit:
        return float(f"{value:.2g}")
    return round(value, 2 if value >= 1 else 3)


# ---- Writing ----


def header(options: argparse.Namespace, load_before: str, seconds: float) -> str:
    command = shlex.join(["python", "benchmarks/costs.py", *sys.argv[1:]])
    rehearsal = "**A rehearsal with tiny models: the numbers mean nothing.**\n\n" if options.tiny else ""
    return f"""{rehearsal}- Command: `{command}` at commit {commit()}; it took {seconds / 60:.0f} minutes
- Versions: {", ".join([*versions(), *peers.versions()])}
- Processor: {processor(options.device)}; load before: {load_before}; after: {load()} (over 1, 5 and 15 minutes)

Whatever is compared ran once per round, in a new order. *Measured* is the median of the ratios within a round, with
their middle half in parentheses; below 1 is faster than the peer. A bar is met if the whole middle half keeps to it;
where the bar lies inside the middle half, the spread hides the answer. A row without a bar promises nothing. The CSV
beside this file also has the number of rounds."""


def summary(lines: Sequence[Line]) -> str:
    verdicts = [line.verdict for line in lines if line.verdict]
    parts = [f"{verdicts.count(name)} {name}" for name in (MET, NOT_MET, HIDDEN, MISSING) if name in verdicts]
    return f"Of {len(verdicts)} bars: {', '.join(parts)}."


def table(group: Group, lines: Sequence[Line]) -> str:
    head = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    rows = [f"| {' | '.join(line.cells())} |" for line in lines]
    return "\n".join([f"## {group.title}\n\n{group.about}\n", *head, *rows])


def write(output: Path, title: str, head: str, lines: Sequence[Line]) -> None:
    by_group = {name: [line for line in lines if line.group == name] for name in GROUPS}
    tables = [table(GROUPS[name], own) for name, own in by_group.items() if own]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join([f"# {title}", head, summary(lines), *tables]) + "\n", encoding="utf-8")
    with output.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Line._fields, *lines])


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="the tables to make")
    parser.add_argument("--threads", type=int, nargs="+", help="of torch; default: 1 and 2, on a GPU those of torch")
    parser.add_argument("--rounds", type=int, help="of everything; default: what each row is worth")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what the models are on")
    parser.add_argument("--peers", nargs="+", default=[], help="folders with peers that are not installed")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny models")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-costs.md, or DATE-costs-gpu.md")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if options.tiny and options.output is None:
        raise ValueError("--tiny: a rehearsal is no result. Say where to write it: --output outputs/costs.md")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds}: give at least 1.")
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here. Leave it out to measure the CPU.")
    options.threads = options.threads or ([torch.get_num_threads()] if on_gpu else [1, 2])
    default = ROOT / "benchmarks" / "results" / f"{date.today()}-costs{'-gpu' * on_gpu}.md"
    options.output = options.output or default
    return options


def main(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    peers.folders += options.peers
    transformers.logging.set_verbosity_error()
    random.seed(0)
    start, load_before = time.monotonic(), load()
    lines: list[Line] = []
    for name in (name for name in GROUPS if name in options.only):
        print(f"\n{GROUPS[name].title}\n{' | '.join(HEADS)}", flush=True)
        for comparison in GROUPS[name].comparisons(options.tiny):
            for threads in options.threads:
                torch.set_num_threads(threads)
                for line in measure(name, comparison, options, threads):
                    lines.append(line)
                    print(" | ".join(line.cells()), flush=True)
                gc.collect()
    title = f"What it costs{' on a GPU' * (options.device == 'cuda')} ({date.today()})"
    write(options.output, title, header(options, load_before, time.monotonic() - start), lines)
    print(f"\n{summary(lines)}\nWritten to {options.output} and its CSV.")


if __name__ == "__main__":
    run(main)
