"""Compare ways of training: run a grid of one of the training scripts, and write what it says.

    python scripts/compare.py --preset gr-table2 --scale cpu --workers 2
    python scripts/compare.py --preset gr-table2 --scale cpu --dataset_name FOLDER --axis gr_r=0.02,0.05

A grid (scripts/grids, or a file of your own) has arms, which are compared with each other, axes, seeds and scales. Any
other flag is passed on to the script; `--axis FLAG=VALUE,VALUE` makes an axis of one. Give the same command again to go
on after an interruption: what is finished is not run again. Workers on other machines that see the same folder join in
by the same command.

Written to the output folder: results.csv (a row per run), table.md, curves.png, and with one axis sensitivity.png, with
two heat_map.png.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from tqdm.auto import tqdm

from hf_gr import script
from hf_gr.config import require_writable
from hf_gr.grid import Grid, Run, expand, load_grid, run_grid
from hf_gr.grid_report import (
    explanation,
    markdown_table,
    plot_arms,
    plot_heat_map,
    plot_sensitivity,
    table_like_the_papers,
    write_results,
)

SCRIPTS = Path(__file__).parent


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = script.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, help="a YAML file, or the name of one in scripts/grids")
    parser.add_argument("--scale", help="one of the grid's scales, e.g. smoke, cpu, paper")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/GRID-SCALE")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--axis", action="append", default=[], metavar="FLAG=VALUE,VALUE")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, with one CPU thread each")
    parser.add_argument("--launcher", default=sys.executable, help="e.g. 'accelerate launch --num_processes 8'")
    parser.add_argument("--storage", help="URL of a database; default: a file in the output folder")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    options, extra = parse_args(sys.argv[1:] if argv is None else argv)
    path = Path(options.preset)
    path = path if path.suffix in (".yaml", ".yml") else SCRIPTS / "grids" / f"{options.preset}.yaml"
    grid = load_grid(path, options.scale)
    grid.seeds = options.seeds or grid.seeds
    for axis in options.axis:
        flag, _, values = axis.partition("=")
        if not values:
            raise ValueError(f"--axis {axis}: write FLAG=VALUE,VALUE.")
        grid.axes[flag] = values.split(",")
    folder = options.output_dir or Path("outputs") / "-".join(filter(None, (path.stem, options.scale)))
    require_writable(str(folder))
    runs = expand(grid, folder, SCRIPTS / "recipes", extra)

    unfinished = [run for run in runs if not run.is_finished]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished.")
    with tqdm(total=len(unfinished), unit="run") as progress:

        def on_end(run: Run, went_well: bool) -> None:
            progress.update()
            if not went_well:
                progress.write(f"{run.name} failed: {run.folder / 'log.txt'}")

        storage = options.storage or str(folder / "runs.log")
        run_grid(SCRIPTS / grid.script, runs, storage, options.workers, on_end, shlex.split(options.launcher))

    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise RuntimeError(f"No run has finished; their output is in {folder}/*/log.txt.")
    published = path.parent / grid.published["file"] if grid.published else None
    command = shlex.join(["python", os.path.relpath(__file__), *(sys.argv[1:] if argv is None else argv)])
    table = report(grid, finished, folder, published, command)
    print(f"\n{table}")
    if len(finished) < len(runs):
        raise RuntimeError(f"{len(runs) - len(finished)} of {len(runs)} runs failed, see log.txt in their folders.")


def report(grid: Grid, runs: list[Run], folder: Path, published: Path | None, command: str) -> str:
    """Write what the finished runs say, and return the table."""
    write_results(runs, folder / "results.csv")
    table = markdown_table(grid, runs, published)
    if len(grid.axes) > 1:
        table = f"{table_like_the_papers(grid, runs, published)}\n{table}"
    (folder / "table.md").write_text(f"`{command}`\n\n{table}\n{explanation(grid)}", encoding="utf-8")
    plot_arms(grid, runs, folder / "curves.png")
    if len(grid.axes) == 1:
        plot_sensitivity(grid, runs, folder / "sensitivity.png")
    if len(grid.axes) == 2:
        plot_heat_map(grid, runs, folder / "heat_map.png")
    return table


if __name__ == "__main__":
    script.run(main)
