"""Test error of the default job of `scripts/train_vit.py` without GR, with vanilla GR and with zero-warmup, over seeds.

python benchmarks/digits.py --seeds 0 1 2 3 4 --folder outputs/digits
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_vit.py"
ARMS = {
    "no GR": ["--gr_lambda", "0"],
    "vanilla GR": ["--gr_warmup", "none"],
    "zero-warmup": [],
}


def run(arm: str, seed: int, folder: Path) -> dict[str, float]:
    output = folder / f"{arm.replace(' ', '-')}-{seed}"
    if not (output / "README.md").exists():
        command = [sys.executable, str(SCRIPT), *ARMS[arm], "--seed", str(seed), "--output_dir", str(output)]
        subprocess.run(
            [*command, "--use_cpu", "--disable_tqdm", "True"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return json.loads((output / "all_results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("outputs/digits"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    options = parser.parse_args()

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {(arm, seed): pool.submit(run, arm, seed, options.folder) for seed in options.seeds for arm in ARMS}
    print("| | test error (%), mean ± std | each seed | test loss | seconds |\n|---|---|---|---|---|")
    for arm in ARMS:
        results = [futures[arm, seed].result() for seed in options.seeds]
        errors = [100 * r["eval_error"] for r in results]
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        loss, seconds = (statistics.mean(r[key] for r in results) for key in ("eval_loss", "train_runtime"))
        each = ", ".join(f"{e:.2f}" for e in errors)
        print(f"| {arm} | {statistics.mean(errors):.2f} ± {spread:.2f} | {each} | {loss:.3f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
