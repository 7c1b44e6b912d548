"""How much sooner one way of training reaches a loss than another, from the folders of finished runs.

    python scripts/compare_runs.py --baseline out/adamw-* --candidate out/admire-* --window 5 --picture curves.png

Each group is one setting with several seeds. The target is a loss, or the lowest that all runs reach; curves are
smoothed by a running mean, so that one lucky batch does not count.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from hf_gr.cli import script
from hf_gr.reporting.comparison import common_target, curve, plot_comparison, speedups
from hf_gr.reporting.plots import require_picture
from hf_gr.reporting.record import History, read_history


def main(argv: list[str] | None = None) -> None:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", nargs="+", action="extend", required=True, help="output folders")
    parser.add_argument("--candidate", nargs="+", action="extend", required=True, help="output folders")
    parser.add_argument("--names", nargs=2, default=["baseline", "candidate"])
    parser.add_argument("--metric", default="loss", help="loss, or eval_loss")
    parser.add_argument("--window", type=int, default=1, help="points in the running mean")
    parser.add_argument("--target", type=float)
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    options = parser.parse_args(argv)
    if options.names[0] == options.names[1]:
        raise ValueError(f"names={' '.join(options.names)}: the groups could not be told apart. Give two names.")
    if options.picture:
        require_picture("picture", options.picture)
    baseline, candidate = (
        histories(flag, getattr(options, flag), options.metric, options.window) for flag in ("baseline", "candidate")
    )
    lowest = common_target([*baseline, *candidate], options.metric, options.window)
    target = lowest if options.target is None else options.target
    if not math.isfinite(target):
        raise ValueError(f"target={target}: this is not a loss. Give a number, or leave it out for {lowest:.4g}.")
    found = speedups(baseline, candidate, target, options.metric, options.window)
    if all(math.isnan(quotient) for _, _, quotient in found.values()):
        raise ValueError(f"target={target:g}: neither group reaches it. All runs reach {lowest:.4g}: leave it out.")
    print(f"Target: {options.metric} {target:.4g}, running mean of {options.window} points.\n")
    print(f"| to the target | {' | '.join(options.names)} | quotient |\n|---|---|---|---|")
    for axis, (a, b, quotient) in found.items():
        print(f"| {axis} | {a:,.4g} | {b:,.4g} | {quotient:.2f} |")
    if options.picture:
        names = tuple(options.names)
        plot_comparison(baseline, candidate, options.picture, names, target, options.metric, options.window)


def histories(flag: str, folders: Sequence[str], metric: str, window: int) -> list[History]:
    """Raises `ValueError` if one of the folders has no curve to compare, or is there twice."""
    paths = [Path(folder).resolve() for folder in folders]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise ValueError(f"{flag}: {', '.join(twice)} is there twice, and would count as two seeds. Give it once.")
    return [_with_curve(flag, path, metric, window) for path in paths]


def _with_curve(flag: str, folder: Path, metric: str, window: int) -> History:
    history = read_history(folder)
    try:
        curve(history, "steps", metric, window)
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: {error}") from error
    return history


if __name__ == "__main__":
    script.run(main)
