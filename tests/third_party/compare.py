"""transformers' own tests of `Trainer`, with `GRTrainer` at `gr_lambda=0` in its place, beside plain `Trainer`:

    make third-party TRANSFORMERS=FOLDER        (a checkout of the version that is installed)

What passes with `Trainer` must pass with `GRTrainer`, but for `EXPECTED`. Prints the table of passes and failures;
exit code 1 if something else differs. Needs what the tests need, `parameterized` among it.
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
#: Patterns of the tests that are to differ, each with the reason.
EXPECTED = {}


def outcomes(checkout: Path, file: Path, swap: bool, timeout: float) -> dict[str, str]:
    """Name of each test of `file` -> passed, failed or skipped; a test that the timeout cut short is missing."""
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
        found: dict[str, str] = {}
        for line in report:
            outcome, name = line.rstrip("\n").split("\t", 1)
            if found.get(name) != "failed":
                found[name] = outcome
        return found


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
            f"checkout={args.checkout}: it has no tests/trainer. Give the folder of a checkout of transformers."
        )

    print(f"transformers {transformers.__version__}\n\n| file | tests | pass with Trainer | pass with GRTrainer |")
    print("|---|---|---|---|")
    totals, differing = [0, 0, 0], []
    for file in files:
        plain, ours = (outcomes(args.checkout, file, swap, args.timeout) for swap in (False, True))
        names = sorted(plain.keys() | ours.keys())
        row = [len(names), *(sum(found.get(name) == "passed" for name in names) for found in (plain, ours))]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        print(f"| {file.name} | {' | '.join(map(str, row))} |", flush=True)
        differing += [n for n in names if (plain.get(n) == "passed") != (ours.get(n) == "passed")]
    print(f"| all | {' | '.join(map(str, totals))} |\n")
    for name in differing:
        print(f"- `{name}`: {reason(name) or 'NOT EXPECTED'}")
    return int(any(reason(name) is None for name in differing))


if __name__ == "__main__":
    sys.exit(main())
