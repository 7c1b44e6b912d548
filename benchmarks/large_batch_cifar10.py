"""LARS with and without warmup, LAMB and TVLARS: a ResNet-18 on CIFAR-10 at growing batch sizes, equal epochs.

    python benchmarks/large_batch_cifar10.py FOLDER --tune --output tune.jsonl
    python benchmarks/large_batch_cifar10.py FOLDER --seeds 0 1 --output runs.jsonl --picture runs.png

FOLDER has CIFAR-10 as `load_dataset` reads it. The learning rate grows linearly with the batch, from the one for 256
examples in `LEARNING_RATES`; `--tune` tries `GRID` at a batch of 1024 with seed 0, and looks at images of the training
split that no run trains on. Every run is a line of the output file; runs that are in it already are not repeated, so
the script can be stopped and started. Last it prints a table.

After so few steps the running statistics of BatchNorm are still those of earlier weights, and an accuracy measured with
them says little. They are taken anew from training images after each run, for all arms alike.

The precision is bf16, which is slow where the processor does not have it: `--extra '{"bf16": false}'`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.swa_utils import update_bn
from transformers import ViTImageProcessorPil, logging, set_seed

from hf_gr import GRConfig, GRTrainer
from hf_gr.data.images import add_augmentation, load_image_dataset, preprocess
from hf_gr.models.presets import create_resnet, initialize_weights
from hf_gr.reporting.plots import COLORS

COSINE = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 1e-3}}
ARMS: dict[str, dict] = {
    "NOWA-LARS": {"optim": "lars", **COSINE},
    "WA-LARS": {"optim": "lars", **COSINE, "warmup_steps": 0.2},
    "LAMB": {"optim": "lamb", **COSINE, "warmup_steps": 0.2},
    "TVLARS": {"optim": "tvlars", "lr_scheduler_type": "constant"},
}
GRID = {
    "NOWA-LARS": [0.5, 1.0, 2.0, 4.0],
    "WA-LARS": [0.5, 1.0, 2.0, 4.0],
    "LAMB": [5e-4, 1e-3, 2e-3, 4e-3],
    "TVLARS": [0.5, 1.0, 2.0, 4.0],
}
#: For a batch of 256; the best of `GRID`.
LEARNING_RATES = {"NOWA-LARS": 2, "WA-LARS": 2, "LAMB": 0.004, "TVLARS": 1}
BATCHES = (256, 1024, 4096)
TRAIN, VALIDATION = 20_480, 4_000

Images = tuple[Tensor, Tensor]


class Examples(torch.utils.data.Dataset):
    """Images and labels that are in memory."""

    def __init__(self, images: Images):
        self.images, self.labels = images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def load(folder: str) -> tuple[Images, Images, Images]:
    """Training, validation and test images; the first two are drawn from the training split, the same every time."""
    dataset = load_image_dataset(folder)
    processor = ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.4914, 0.4822, 0.4465], image_std=[0.2470, 0.2435, 0.2616]
    )

    def tensors(split, start: int, stop: int) -> Images:
        chosen = preprocess(split.select(range(start, stop)), processor, "img", "label")[:]
        return chosen["pixel_values"], torch.tensor(chosen["labels"])

    train = dataset["train"].shuffle(seed=0)
    return (
        tensors(train, 0, TRAIN),
        tensors(train, TRAIN, TRAIN + VALIDATION),
        tensors(dataset["test"], 0, len(dataset["test"])),
    )


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Images) -> float:
    model.eval()
    pairs = zip(*(t.split(500) for t in images), strict=True)
    return sum((model(x).logits.argmax(-1) == y).sum().item() for x, y in pairs) / len(images[1])


def run(
    arm: str,
    batch: int,
    rate: float,
    seed: int,
    epochs: int,
    train: Images,
    evaluations: dict[str, Images],
    extra: dict,
) -> dict:
    steps = epochs * (len(train[1]) // batch)
    flags = {"bf16": True, **ARMS[arm], **extra}
    weight_init = flags.pop("weight_init", None)
    args = GRConfig(
        tempfile.mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        dataloader_drop_last=True,
        learning_rate=rate,
        lr_scaling="linear",
        weight_decay=5e-4,
        max_grad_norm=0,
        gr_lambda=0,
        seed=seed,
        logging_steps=max(1, steps // 30),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **flags,
    )
    set_seed(seed)
    model = create_resnet("resnet-18", [str(i) for i in range(10)])
    if weight_init is not None:
        initialize_weights(model, weight_init)
    add_augmentation(model, flip=True, crop_padding=4)
    trainer = GRTrainer(model, args, train_dataset=Examples(train))
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    model.cpu()
    stale = {name: accuracy(model, images) for name, images in evaluations.items()}
    update_bn([{"pixel_values": x} for x in train[0][:5120].split(512)], _Plain(model))
    history = [e for e in trainer.state.log_history if "loss" in e]
    return {
        "arm": arm,
        "batch": batch,
        "learning_rate": rate,
        "seed": seed,
        "epochs": epochs,
        "extra": extra,
        "accuracy": {name: accuracy(model, images) for name, images in evaluations.items()},
        "accuracy_with_running_statistics": stale,
        "loss": {e["step"]: e["loss"] for e in history},
        "cpu_seconds": seconds,
    }


class _Plain(torch.nn.Module):
    """A model that `update_bn` can call."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict) -> None:
        # Through the inner module: the augmentation of the training images is not wanted here.
        self.model.resnet(**inputs)


def table(runs: list[dict], which: str) -> None:
    kinds = sorted(
        {(r["batch"], list(ARMS).index(r["arm"]), r["learning_rate"], str(r["extra"]), r["epochs"]) for r in runs}
    )
    print(f"| batch | arm | learning rate at 256 | epochs | {which} accuracy (%), mean ± std | each seed | last loss |")
    print("|---|---|---|---|---|---|---|")
    for batch, index, rate, extra, epochs in kinds:
        key = (batch, list(ARMS)[index], rate, extra, epochs)
        mine = [r for r in runs if (r["batch"], r["arm"], r["learning_rate"], str(r["extra"]), r["epochs"]) == key]
        scores = [100 * r["accuracy"][which] for r in sorted(mine, key=lambda r: r["seed"])]
        std = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        loss = statistics.mean(list(r["loss"].values())[-1] for r in mine)
        each = ", ".join(f"{s:.1f}" for s in scores)
        name = key[1] + (f" {extra}" if extra != "{}" else "")
        print(f"| {batch} | {name} | {rate:g} | {epochs} | {statistics.mean(scores):.1f}{std} | {each} | {loss:.2f} |")


def picture(runs: list[dict], path: str) -> None:
    """Training loss along each run, and the accuracy against the batch."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    *curves, scores = figure.subplots(1, len(BATCHES) + 1)
    for arm, color in zip(ARMS, COLORS, strict=False):
        for axis, batch in zip(curves, BATCHES, strict=True):
            mine = [r for r in runs if (r["arm"], r["batch"]) == (arm, batch)]
            for i, r in enumerate(mine):
                steps, losses = [int(s) for s in r["loss"]], list(r["loss"].values())
                axis.plot(steps, losses, color=color, linewidth=1, label=arm if i == 0 else None)
            axis.set(title=f"batch {batch}", xlabel="optimizer step", ylabel="training loss", ylim=(0.6, 2.6))
        means = {b: [100 * r["accuracy"]["test"] for r in runs if (r["arm"], r["batch"]) == (arm, b)] for b in BATCHES}
        means = {b: v for b, v in means.items() if v}
        scores.errorbar(
            list(means),
            [statistics.mean(v) for v in means.values()],
            [statistics.stdev(v) if len(v) > 1 else 0 for v in means.values()],
            color=color,
            marker="o",
            capsize=3,
            label=arm,
        )
    scores.set(title="accuracy", xlabel="batch", ylabel="test accuracy (%)", xscale="log", xticks=BATCHES)
    scores.set_xticklabels(BATCHES)
    scores.minorticks_off()
    for axis in (*curves, scores):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--output", default="large_batch_cifar10.jsonl")
    parser.add_argument("--picture", help="where to draw the runs of the output file")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, help="for a batch of 256, if not that of LEARNING_RATES")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--extra", type=json.loads, default={}, help="more flags, and weight_init, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()

    output = Path(options.output)
    train, validation, test = load(options.folder)
    evaluations = {"validation": validation} if options.tune else {"test": test}
    for seed in [0] if options.tune else options.seeds:
        for batch in [1024] if options.tune else options.batches:
            for arm in options.arms:
                for rate in GRID[arm] if options.tune else [options.learning_rate or LEARNING_RATES[arm]]:
                    key = (arm, batch, rate, seed, options.epochs, options.extra)
                    if key not in [_key(r) for r in _runs(output)]:
                        result = run(arm, batch, rate, seed, options.epochs, train, evaluations, options.extra)
                        with output.open("a") as file:
                            file.write(json.dumps(result) + "\n")
    table(_runs(output), *evaluations)
    if options.picture:
        picture(_runs(output), options.picture)


def _runs(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def _key(r: dict) -> tuple:
    return tuple(r[name] for name in ("arm", "batch", "learning_rate", "seed", "epochs", "extra"))


if __name__ == "__main__":
    main()
