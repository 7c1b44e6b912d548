"""transformers' own tests of `Trainer`, with `GRTrainer` at `gr_lambda=0` in its place, beside plain `Trainer`.

    make third-party TRANSFORMERS=FOLDER        # a checkout of transformers

Whatever passes with `Trainer` must pass with `GRTrainer`, except for `EXPECTED`. Prints a table of passes; exit code 1
if anything else differs. The environment needs what those tests need: `parameterized`, and `sentencepiece` for some.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

REPOSITORY = Path(__file__).parents[2]
#: Patterns of tests that differ as they should, each with the reason.
EXPECTED = {
    "::test_add_remove_callback": "compares the exact list of callbacks, of which GRTrainer has its own",
    "::test_init_callback": "compares the exact list of callbacks, of which GRTrainer has its own",
    "::test_can_resume_training": "compares the logs of two runs, and GRTrainer logs train_seconds, which differ",
    "::test_compare_trainer_and_checkpoint_args_logging": "resumes on twice the data, which GRTrainer refuses",
    "::test_save_best_checkpoint": "counts the files in the output folder, where GRTrainer keeps run.json",
}


def outcomes(checkout: Path, file: Path, swap: bool, timeout: float) -> tuple[dict[str, str], int]:
    """Name of each test of `file` -> passed, failed or skipped, without those that a timeout cut short; and how many
    trainers were made with the mixin."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as report:
        paths = [str(REPOSITORY), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_GR_SWAP": str(int(swap)),
            "HF_GR_OUTCOMES": report.name,
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", str(file)]
        try:
            subprocess.run(command, cwd=checkout, env=environment, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"{file.name}: stopped after {timeout:g} s", file=sys.stderr)
        return _read(report.read())


def _read(report: str) -> tuple[dict[str, str], int]:
    found: dict[str, str] = {}
    made = 0
    for line in report.splitlines():
        outcome, name = line.split("\t", 1)
        if outcome == "swapped":
            made = int(name)
        elif found.get(name) != "failed":  # a failure of the setup or the teardown counts, too
            found[name] = outcome
    return found, made


def reason(name: str) -> str | None:
    return next((why for pattern, why in EXPECTED.items() if fnmatch.fnmatch(name, f"*{pattern}*")), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a file")
    parser.add_argument("--pattern", default="**/test_*.py", help="which files of tests/trainer")
    args = parser.parse_args()
    files = sorted((args.checkout / "tests" / "trainer").glob(args.pattern))
    if not files:
        parser.error(
            f"checkout={args.checkout}: no tests/trainer there. Give the folder of a checkout of transformers."
        )
    print(f"transformers {transformers.__version__}\n")
    print("| file | tests | pass with Trainer | pass with GRTrainer | trainers made by GRTrainer's tests |")
    print("|---|---|---|---|---|")
    totals, differing = [0, 0, 0, 0], []
    for file in files:
        (plain, _), (ours, made) = (outcomes(args.checkout, file, swap, args.timeout) for swap in (False, True))
        names = sorted(plain.keys() | ours.keys())
        row = [len(names), *(sum(found.get(name) == "passed" for name in names) for found in (plain, ours)), made]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        print(f"| {file.name} | {' | '.join(map(str, row))} |", flush=True)
        differing += [name for name in names if (plain.get(name) == "passed") != (ours.get(name) == "passed")]
    print(f"| all | {' | '.join(map(str, totals))} |\n")
    for name in differing:
        print(f"- `{name}`: {reason(name) or 'NOT EXPECTED'}")
    if totals[3] == 0:
        print("No trainer was made with the mixin: the swap did not act, and the two columns are of the same class.")
    return int(totals[3] == 0 or any(reason(name) is None for name in differing))


if __name__ == "__main__":
    sys.exit(main())
