"""Every scope of GR on 1, 2 and 4 processes (gloo), with and without accumulation, in each precision, against a
reference in plain torch that knows no process: the path of the weights over three steps of SGD.

    python benchmarks/distributed_accuracy.py [--processes 1 2 4]

The error is the largest difference of the paths, relative to the way travelled, over lambda = r and lambda = r/2. The
processes compare their weights after every step, bit for bit; a run in which they differ ends here with an error.
`scaled` is float32 with a gradient scaler, as fp16 has one; the reference of bf16 runs its passes in bf16, too.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.distributed_worker import PRECISIONS
from helpers.training import relative_error_of_path
from trainer.test_distributed import launch, reference_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}\n")
    columns = [(precision, accumulation) for precision in PRECISIONS for accumulation in (1, 3)]
    print(f"| sharing | processes | scope | {' | '.join(f'{p}, accumulation {a}' for p, a in columns)} | ranks equal |")
    print("|---" * (4 + len(columns)) + "|")
    for count in options.processes:
        suites = ["scopes", "fsdp"] if count == 2 else ["scopes"]
        with tempfile.TemporaryDirectory() as folder:
            results = launch(Path(folder), count, *suites)
        paths = {("DDP" if count > 1 else "none", *case): path for case, path in results["scopes"].items()}
        for case, path in results.get("fsdp", {}).items():
            if isinstance(case, tuple):
                paths[("FSDP2", "global", *case)] = path
        errors: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
        for (sharing, scope, accumulation, degree, precision), path in paths.items():
            expected = reference_path(scope, accumulation, degree, precision, count)
            row = errors.setdefault((sharing, scope), {})
            column = (precision, accumulation)
            row[column] = max(row.get(column, 0.0), relative_error_of_path(path, expected))
        for (sharing, scope), row in errors.items():
            cells = " | ".join(f"{row[column]:.0e}" if column in row else "" for column in columns)
            print(f"| {sharing} | {count} | `{scope}` | {cells} | {'yes' if count > 1 else ''} |")


if __name__ == "__main__":
    main()
