"""`hf-gr`, the console command: the scripts, and what else can be done with a run.

Imports nothing at the top that `hf-gr --help` does not need.
"""

import ast
import inspect
import math
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .shipped import COMMAND, SCRIPTS, SCRIPTS_PACKAGE

if TYPE_CHECKING:
    from ..errors import ArgumentParser

#: Commands that are scripts -> their files in `SCRIPTS`.
FILES = {
    "vit": "train_vit",
    "llama": "pretrain_llama",
    "lora": "finetune_llama_lora",
    "barlow": "pretrain_barlow_twins",
    "compare": "compare",
    "evaluate": "evaluate_llama",
    "robustness": "evaluate_robustness",
    "sharpness": "evaluate_sharpness",
    "features": "evaluate_features",
    "forgetting": "evaluate_forgetting",
}


def card(argv: list[str]) -> None:
    """Rewrite the model card of a run.

    From its run.json and trainer_state.json.
    """
    from ..reporting.card import write_card

    parser = _parser(card)
    parser.add_argument("folder", type=Path, help="the output folder of a run")
    write_card(parser.parse_args(argv).folder)


def diagnose(argv: list[str]) -> None:
    """Say in plain words whether GR is harming a run.

    From its run.json and its log, or those of its last checkpoint. Each line has a verdict and the numbers that it
    rests on.
    """
    from ..analysis.diagnosis import Part, Run
    from ..analysis.diagnosis import diagnose as findings_of
    from ..reporting.record import FILE, last_state, log_of, read_record

    parser = _parser(diagnose)
    parser.add_argument("folder", type=Path, help="the output folder of a run, or one of its checkpoints")
    folder = parser.parse_args(argv).folder
    record = read_record(folder) or read_record(last_state(folder))
    if record is None:
        raise ValueError(f"{folder}: there is no {FILE}. Give the output folder of a run of hf_gr.")
    log = log_of(record, folder)
    run = Run(
        parts=[
            Part(s.first_step, s.last_step, {**record.defaults, **s.settings} if s.is_recorded else None)
            for s in record.segments
        ],
        log=log.history,
        max_steps=log.max_steps,
        optimizer=record.method.get("optimizer") or "the optimizer",
        optimizer_settings=record.optimizer.settings if record.optimizer else {},
        regularized_steps=int(record.total("regularized_steps") + record.total("momentum_steps")),
        skipped_steps=int(record.total("skipped_steps")),
    )
    for verdict, sentence in findings_of(run):
        print(textwrap.fill(sentence, 110, initial_indent=f"{verdict:13}", subsequent_indent=" " * 13))


def plots(argv: list[str]) -> None:
    """Redraw the curves of a run, or its layers, those of several runs side by side.

        hf-gr plots out/tvlars
        hf-gr plots --layers out/lars out/tvlars --picture layers.png

    From its trainer_state.json, or that of its last checkpoint. Layers are in runs with layer_statistics_steps.
    """
    from ..reporting import plots as pictures
    from ..reporting.record import last_state, read_history

    parser = _parser(plots)
    parser.add_argument(
        "folders", metavar="folder", nargs="+", type=Path, help="the output folder of a run, or one of its checkpoints"
    )
    parser.add_argument("--layers", action="store_true", help="norms and learning rates of each layer")
    parser.add_argument(
        "--picture",
        type=Path,
        help=f"default, for one run: {pictures.PICTURE} or {pictures.LAYER_PICTURE} in its folder",
    )
    options = parser.parse_args(argv)
    folders = options.folders
    if len(folders) > 1 and not (options.layers and options.picture):
        raise ValueError(f"{len(folders)} folders: give one run, or --layers and --picture for several side by side.")
    if repeated := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise ValueError(f"folder={repeated[0]} is given twice. Give it once.")
    histories = {folder: read_history(last_state(folder)) for folder in folders}
    for folder, history in histories.items():
        if not history:
            raise ValueError(f"folder={folder}: the run has logged nothing to plot. Give another run.")
    picture = options.picture or folders[0] / (pictures.LAYER_PICTURE if options.layers else pictures.PICTURE)
    pictures.require_picture("picture", picture)
    if options.layers:
        runs = {str(folder): (pictures.read_layer_statistics(folder), h) for folder, h in histories.items()}
        pictures.plot_layer_statistics(runs, picture)
    else:
        pictures.plot_curves(histories[folders[0]], picture)


def figure(argv: list[str]) -> None:
    """Draw a figure of the GR paper that needs no run.

    hf-gr figure adaptive-lr variance.png
    """
    from ..reporting.plots import require_picture
    from ..reporting.theory_figures import FIGURES

    parser = _parser(figure)
    helps = "; ".join(f"{name}: {entry.help}" for name, entry in FIGURES.items())
    parser.add_argument("name", choices=FIGURES, help=helps)
    parser.add_argument("picture", type=Path, help="where to draw it")
    options = parser.parse_args(argv)
    require_picture("picture", options.picture)
    FIGURES[options.name].draw(options.picture)


def speedup(argv: list[str]) -> None:
    """Compare how soon two groups of runs reach a loss.

        hf-gr speedup --baseline out/adamw-* --candidate out/admire-* --window 5 --picture curves.png

    Each group is one setting with several seeds. The target is a loss, by default the lowest that all runs reach.
    Curves are smoothed by a running mean, so that one lucky batch does not count.
    """
    from ..reporting.comparison import common_target, read_curves, speedups
    from ..reporting.comparison_plots import plot_comparison
    from ..reporting.plots import require_picture

    parser = _parser(speedup)
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
    print("\n".join(lines))
    if options.picture:
        plot_comparison(baseline, candidate, options.picture, tuple(options.names), target, *smoothed)


def env(argv: list[str]) -> None:
    """Show versions and devices, for a bug report."""
    from .inventory import environment

    _parser(env).parse_args(argv)
    print("\n".join(f"{name}: {value}" for name, value in environment().items()))


def optimizers(argv: list[str]) -> None:
    """List the optimizers that --optim knows, and what has to be installed for them."""
    from .inventory import optimizers as rows

    _parser(optimizers).parse_args(argv)
    print("\n".join(f"{name:28} {about}" for name, about in rows().items()))


def run_script(name: str, argv: list[str]) -> None:
    """Run one of the scripts."""
    started, sys.argv[0] = sys.argv[0], f"{COMMAND} {name}"  # for the usage, and for the command on the card
    try:
        import_module(f"{SCRIPTS_PACKAGE}.{FILES[name]}").main(argv)
    finally:
        sys.argv[0] = started


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{name: partial(run_script, name) for name in FILES},
    **{function.__name__: function for function in (speedup, diagnose, card, plots, figure, env, optimizers)},
}


def about(name: str) -> str:
    """What a command does: the first sentence of its docstring. A script is read, not imported."""
    if name in FILES:
        text = ast.get_docstring(ast.parse((SCRIPTS / f"{FILES[name]}.py").read_text(encoding="utf-8")))
    else:
        text = COMMANDS[name].__doc__
    return (text or "").partition("\n\n")[0].replace("\n", " ")


def usage() -> str:
    """The text of `hf-gr --help`."""
    commands = "\n".join(f"  {name:12}{about(name)}" for name in COMMANDS)
    return f"usage: {COMMAND} COMMAND ...\n\n{commands}\n\n{COMMAND} COMMAND --help shows the flags of a command."


def _parser(command: Callable[[list[str]], None]) -> "ArgumentParser":
    from ..errors import ArgumentParser

    description = inspect.cleandoc(command.__doc__ or "")
    name = f"{COMMAND} {command.__name__}"
    return ArgumentParser(prog=name, description=description, formatter_class=RawDescriptionHelpFormatter)


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
    elif argv[0] not in COMMANDS:
        raise ValueError(f"{argv[0]!r}: there is no such command. Choose one of {', '.join(COMMANDS)}.")
    else:
        COMMANDS[argv[0]](argv[1:])


def entry() -> None:
    """Entry point of `hf-gr`."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        main(sys.argv[1:])
        return
    from ..errors import run

    run(main)


if __name__ == "__main__":
    entry()
