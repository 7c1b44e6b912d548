"""How much sooner one way of training reaches a loss than another, from the folders of finished runs.

    python scripts/compare_runs.py --baseline out/adamw-* --candidate out/admire-* --window 5 --picture curves.png

Each group is one setting with several seeds. The target is a loss, or the lowest that all runs reach; curves are
smoothed by a running mean, so that one lucky batch does not count.
"""

import argparse
import json
from pathlib import Path

from hf_gr import script
from hf_gr.comparison import common_target, plot_comparison, speedups


def history(folder: str) -> list[dict[str, float]]:
    path = Path(folder) / "trainer_state.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no trainer_state.json. Give the output folders of finished runs.")
    return json.loads(path.read_text())["log_history"]


def main(argv: list[str] | None = None) -> None:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", nargs="+", required=True, help="output folders")
    parser.add_argument("--candidate", nargs="+", required=True, help="output folders")
    parser.add_argument("--names", nargs=2, default=["baseline", "candidate"])
    parser.add_argument("--metric", default="loss", help="loss, or eval_loss")
    parser.add_argument("--window", type=int, default=1, help="points in the running mean")
    parser.add_argument("--target", type=float)
    parser.add_argument("--picture", help="where to draw the curves")
    options = parser.parse_args(argv)
    baseline, candidate = ([history(folder) for folder in group] for group in (options.baseline, options.candidate))
    target = options.target
    if target is None:
        target = common_target([*baseline, *candidate], options.metric, options.window)
    print(f"Target: {options.metric} {target:.4g}, running mean of {options.window} points.\n")
    print(f"| to the target | {' | '.join(options.names)} | quotient |\n|---|---|---|---|")
    for axis, (a, b, quotient) in speedups(baseline, candidate, target, options.metric, options.window).items():
        print(f"| {axis} | {a:,.4g} | {b:,.4g} | {quotient:.2f} |")
    if options.picture:
        names = tuple(options.names)
        plot_comparison(baseline, candidate, options.picture, names, target, options.metric, options.window)


if __name__ == "__main__":
    script.run(main)
