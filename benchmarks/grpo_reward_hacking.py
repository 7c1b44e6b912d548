"""True reward against a proxy that can be exploited: GRPO alone, with a KL penalty, and with gradient regularization.

    python benchmarks/grpo_reward_hacking.py --output_dir outputs/reward-hacking

The task is that of `examples/grpo_gr.py`: a small Llama that sorts digits, and whose reward has a bonus for nines. Each
arm tries three values of one setting on a seed of its own, GRPO alone of the learning rate. The value with the most
true reward at the end is trained on the other seeds. All runs of a seed start at the same weights and see the same
prompts.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import grpo_gr

HACKABLE, SUPERVISED_STEPS, EVERY = 1.5, 80, 5
#: The end of a run: its last log entries, whose mean is compared.
LAST = 4
#: Of a path.
COLUMNS = ("step", "true_reward", "proxy_reward", "grad_norm")


class Arm(NamedTuple):
    """A method: how it is called, the setting that is tuned, its values, and the flags that stay."""

    name: str
    setting: str
    values: tuple[float, ...]
    flags: dict[str, Any]


ARMS = {
    "none": Arm("GRPO alone", "learning_rate", (1e-4, 3e-4, 1e-3), {"gr_lambda": 0.0}),
    "kl": Arm("KL penalty", "beta", (0.1, 0.3, 1.0), {"gr_lambda": 0.0}),
    "gr": Arm("GR", "gr_lambda", (1e-3, 3e-3, 1e-2), {"gr_r": 1e-3}),
}


class Run(NamedTuple):
    """One run and its path, whose entries have `COLUMNS`."""

    stage: str
    arm: str
    value: float
    learning_rate: float
    seed: int
    path: list[tuple[float, ...]]

    def end(self) -> list[float]:
        """True reward, proxy reward and norm of the gradient at the end."""
        return [round(statistics.mean(column), 4) for column in list(zip(*self.path[-LAST:], strict=True))[1:]]


def run(stage: str, key: str, value: float, seed: int, steps: int, folder: Path, **more: Any) -> Run:
    arm, start = ARMS[key], folder / f"supervised-{seed}"
    if not start.is_dir():
        grpo_gr.save_supervised(start, SUPERVISED_STEPS, seed)
    flags = {"max_steps": steps, "logging_steps": EVERY, "seed": seed, "disable_tqdm": True, "use_cpu": True}
    config = grpo_gr.Config(output_dir=str(folder / "run"), **{**flags, **arm.flags, **more, arm.setting: value})
    logs = grpo_gr.train(start, config, HACKABLE)
    keys = ("step", "rewards/true_reward/mean", "reward", "gr_grad_norm" if key == "gr" else "grad_norm")
    path = [tuple(entry[name] for name in keys) for entry in logs]
    done = Run(stage, key, value, config.learning_rate, seed, path)
    print(f"{stage} {arm.name}, {arm.setting}={value:g}, seed {seed}: true, proxy, norm = {done.end()}", flush=True)
    return done


def write(runs: list[Run], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["stage", "arm", "setting", "value", "learning_rate", "seed", *COLUMNS])
        for each in runs:
            facts = [each.stage, each.arm, ARMS[each.arm].setting, each.value, each.learning_rate, each.seed]
            writer.writerows([*facts, step, *(round(value, 4) for value in values)] for step, *values in each.path)


def draw(runs: list[Run], file: Path) -> None:
    """Left, both rewards over the run, as means over the seeds with their ranges; right, one against the other."""
    figure, (over_time, against) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (key, arm) in enumerate(ARMS.items()):
        paths = [each.path for each in runs if each.arm == key]
        steps = [step for step, *_ in paths[0]]
        for which, style in ((1, "-"), (2, ":")):
            values = [[path[k][which] for path in paths] for k in range(len(steps))]
            label = f"{arm.name}, {'true' if which == 1 else 'proxy'}"
            over_time.plot(steps, [statistics.mean(v) for v in values], style, color=f"C{i}", label=label)
            if which == 1:
                over_time.fill_between(steps, list(map(min, values)), list(map(max, values)), color=f"C{i}", alpha=0.15)
        for path in paths:
            against.plot([entry[2] for entry in path], [entry[1] for entry in path], color=f"C{i}", alpha=0.6)
            against.plot(path[-1][2], path[-1][1], "o", color=f"C{i}")
    over_time.set(xlabel="step", ylabel="reward", title="Mean over the seeds; range of the true reward")
    against.set(xlabel="proxy reward", ylabel="true reward", title="Each seed; the dot is the end")
    for axes in (over_time, against):
        axes.grid(alpha=0.3)
    figure.legend(*over_time.get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reward-hacking"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning_seed", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="Of the runs of --try_only.")
    parser.add_argument("--try_only", nargs="+", default=[], metavar=("ARM", "VALUE"),
                        help="Run other values of one arm on the seeds, and nothing else.")  # fmt: skip
    args = parser.parse_args()
    if args.try_only:
        key, *values = args.try_only
        flags = {"learning_rate": args.learning_rate}
        tried = [run("tried", key, float(value), seed, args.steps, args.output_dir, **flags)
                 for value in values for seed in args.seeds]  # fmt: skip
        write(tried, args.output_dir / "grpo-reward-hacking-tried.csv")
        return
    tuning = [run("tuning", key, value, args.tuning_seed, args.steps, args.output_dir)
              for key, arm in ARMS.items() for value in arm.values]  # fmt: skip
    best = {key: max((r for r in tuning if r.arm == key), key=lambda r: r.end()[0]).value for key in ARMS}
    tested = [run("test", key, best[key], seed, args.steps, args.output_dir) for seed in args.seeds for key in ARMS]
    write([*tuning, *tested], args.output_dir / "grpo-reward-hacking.csv")
    draw(tested, args.output_dir / "grpo-reward-hacking.png")


if __name__ == "__main__":
    main()
