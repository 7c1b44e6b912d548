"""`hf-gr`: cards, plots and comparisons of finished runs, from their output folders.

    hf-gr card FOLDER                                      # rewrites README.md
    hf-gr plots FOLDER                                     # redraws curves.png
    hf-gr compare --baseline FOLDERS --candidate FOLDERS   # how much sooner a loss is reached

hf-gr COMMAND --help lists the flags of a command.
"""

import inspect
import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from ..errors import ArgumentParser, run


def card(argv: list[str]) -> None:
    """Rewrite the model card of a run, from its run.json and trainer_state.json."""
    from ..reporting.card import write_card

    parser = _parser(card)
    parser.add_argument("folder", type=Path, help="the output folder of a run")
    write_card(parser.parse_args(argv).folder)


def plots(argv: list[str]) -> None:
    """Redraw the curves of a run, from its trainer_state.json or that of its last checkpoint."""
    from ..reporting.plots import PICTURE, plot_curves, require_picture
    from ..reporting.record import last_state, read_history

    parser = _parser(plots)
    parser.add_argument("folder", type=Path, help="the output folder of a run, or one of its checkpoints")
    parser.add_argument("--picture", type=Path, help=f"default: {PICTURE} in the folder")
    options = parser.parse_args(argv)
    history = read_history(last_state(options.folder))
    if not history:
        raise ValueError(f"folder={options.folder}: the run has logged nothing to plot. Give another run.")
    picture = options.picture or options.folder / PICTURE
    require_picture("picture", picture)
    plot_curves(history, picture)


def compare(argv: list[str]) -> None:
    """Compare how soon two ways of training reach a loss, from the folders of finished runs.

        hf-gr compare --baseline out/adamw-* --candidate out/admire-* --window 5 --picture curves.png

    Each group is one setting with several seeds. The target is a loss, by default the lowest that all runs reach.
    Curves are smoothed by a running mean, so that one lucky batch does not count.
    """
    from ..reporting.comparison import common_target, read_curves, speedups
    from ..reporting.comparison_plots import plot_comparison
    from ..reporting.plots import require_picture

    parser = _parser(compare)
    parser.add_argument("--baseline", nargs="+", action="extend", required=True, help="output folders")
    parser.add_argument("--candidate", nargs="+", action="extend", required=True, help="output folders")
    parser.add_argument("--names", nargs=2, default=["baseline", "candidate"])
    parser.add_argument("--metric", default="loss", help="loss or eval_loss")
    parser.add_argument("--window", type=int, default=1, help="points in the running mean")
    parser.add_argument("--target", type=float)
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    options = parser.parse_args(argv)
    if options.names[0] == options.names[1]:
        raise ValueError(f"names={' '.join(options.names)}: both groups have the same name. Give two names.")
    if options.picture:
        require_picture("picture", options.picture)
    smoothed = options.metric, options.window
    baseline, candidate = (read_curves(flag, getattr(options, flag), *smoothed) for flag in ("baseline", "candidate"))
    lowest = common_target([*baseline, *candidate], *smoothed)
    target = lowest if options.target is None else options.target
    if not math.isfinite(target):
        raise ValueError(f"target={target}: a loss is finite. Give a number, or leave it out for {lowest:.4g}.")
    results = speedups(baseline, candidate, target, *smoothed)
    if all(math.isnan(quotient) for _, _, quotient in results.values()):
        raise ValueError(f"target={target:g}: neither group reaches it. All runs reach {lowest:.4g}: leave target out.")
    lines = [f"Target: {options.metric} {target:.4g}, running mean of {options.window} points.", ""]
    lines += [f"| to the target | {' | '.join(options.names)} | quotient |", "|---|---|---|---|"]
    lines += [f"| {axis} | {a:,.4g} | {b:,.4g} | {quotient:.2f} |" for axis, (a, b, quotient) in results.items()]
    print("\n".join(lines))  # noqa: T201
    if options.picture:
        plot_comparison(baseline, candidate, options.picture, tuple(options.names), target, *smoothed)


COMMANDS = {function.__name__: function for function in (card, plots, compare)}


def _parser(command: Callable[[list[str]], None]) -> ArgumentParser:
    description = inspect.cleandoc(command.__doc__ or "")
    name = f"hf-gr {command.__name__}"
    return ArgumentParser(prog=name, description=description, formatter_class=RawDescriptionHelpFormatter)


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)  # noqa: T201
    elif argv[0] not in COMMANDS:
        raise ValueError(f"{argv[0]!r}: there is no such command. Choose one of {', '.join(COMMANDS)}.")
    else:
        COMMANDS[argv[0]](argv[1:])


def entry() -> None:
    """Entry point of `hf-gr`."""
    run(main)


if __name__ == "__main__":
    entry()
