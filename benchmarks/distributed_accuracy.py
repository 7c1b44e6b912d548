"""Every scope of GR on 1, 2 and 4 processes (gloo), with and without accumulation, in each precision, against a
reference in plain torch that knows no process: the path of the weights over three steps of SGD.

    python benchmarks/distributed_accuracy.py [--processes 1 2 4]

The error is the largest difference of the paths, relative to the way travelled. The processes compare their weights
after every step, bit for bit; a run in which they differ ends here with an error. `scaled` is float32 with a gradient
scaler, as fp16 has one; the reference of bf16 runs its passes in bf16, too.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from test_distributed import launch, reference_path
from test_trainer import relative_error_of_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}\n")
    print("| sharing | processes | scope | accumulation | lambda/r | precision | error | ranks equal |")
    print("|---|---|---|---|---|---|---|---|")
    for count in options.processes:
        suites = ["scopes", "fsdp"] if count == 2 else ["scopes"]
        with tempfile.TemporaryDirectory() as folder:
            results = launch(Path(folder), count, *suites)
        rows = {("DDP" if count > 1 else "none", *case): path for case, path in results["scopes"].items()}
        for case, path in results.get("fsdp", {}).items():
            if isinstance(case, tuple):
                rows[("FSDP2", "global", *case)] = path
        for (sharing, *case), path in rows.items():
            error = relative_error_of_path(path, reference_path(*case, count))
            scope, accumulation, degree, precision = case
            print(f"| {sharing} | {count} | {scope} | {accumulation} | {degree} | {precision} | {error:.1e} | yes |")


if __name__ == "__main__":
    main()
