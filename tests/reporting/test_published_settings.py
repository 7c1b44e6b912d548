"""Every `paper` scale of the image grids against what was published, cell by cell.

`PUBLISHED` is the one table of it: for each scale, what holds everywhere, what each arm sets, and the axes, which are
all combined. Where the papers are silent and their released code is not, it is the code that counts as published.
`OURS` has the settings that neither has: the grid or its recipe must say so.
"""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from hf_gr.cli import recipes
from hf_gr.cli.shipped import GRIDS, RECIPES
from hf_gr.reporting.grid import Run, expand
from hf_gr.reporting.grid_file import Grid, load_grid
from hf_gr.scripts import train_vit

CIFAR, CIFAR_100 = "uoft-cs/cifar10", "uoft-cs/cifar100"
TINY, IMAGENET = "zh-plus/tiny-imagenet", "ILSVRC/imagenet-1k"


class Published(NamedTuple):
    everywhere: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    axes: dict[str, list[Any]] = {}
    #: arm -> axes that do not change it.
    without: dict[str, list[str]] = {}


# ---- GR paper: Table 3 (T_w of 20, 40 or 80 epochs); clipping at 5 and decay of everything are the code's ----

GR = {"num_train_epochs": 300, "batch": 256, "weight_decay": 0.03, "lr_scheduler_type": "cosine"}
GR |= {"max_grad_norm": 5, "decay_norms_and_biases": True, "optim": "adamw_torch_fused"}
#: What its other tables use of the search; r, lambda/r, T_w and learning rate of the released command for zero-warmup.
GR_CHOSEN = GR | {"learning_rate": 1e-3, "warmup_steps": 40 / 300, "gr_r": 0.1, "gr_lambda": None}
POLICIES = {
    "no GR": {"gr_lambda": 0},
    "vanilla GR": {"gr_warmup": "none"},
    "r-warmup": {"gr_warmup": "r"},
    "lambda-warmup": {"gr_warmup": "lambda"},
    "zero-warmup": {"gr_warmup": "zero"},
}
VITS, CIFARS = ["vit-ti", "vit-s", "vit-b"], [CIFAR, CIFAR_100]
SWINS = ["swin-tiny", "swin-small", "swin-base"]
CAITS = ["cait-xxs12", "cait-xxs24", "cait-xs12", "cait-s12"]
OPTIMIZERS = {"optim": ["adamw_torch_fused", "rmsprop"]}
without_optim = {key: value for key, value in GR_CHOSEN.items() if key != "optim"}

# ---- SAM paper: Table 4; batch, learning rate, momentum, decay and clipping are the code's ----

SAM = {"model": "resnet-32", "dataset_name": CIFAR, "num_train_epochs": 200, "batch": 128, "learning_rate": 0.1}
SAM |= {"lr_scheduler_type": "cosine", "optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "max_grad_norm": 5}
SAM |= {"weight_decay": 1e-3, "decay_norms_and_biases": True}

# ---- IRE paper: Tables 1 to 4, kappa in the replies to its reviewers; all else is the code's ----

IRE_CIFAR = {"num_train_epochs": 200, "batch": 128, "lr_scheduler_type": "cosine", "weight_decay": 5e-4}
IRE_CIFAR |= {"decay_norms_and_biases": True, "max_grad_norm": 0, "label_smoothing_factor": 0.1, "warmup_steps": 0}
IRE_CIFAR |= {"ire_interval": 10}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}
AT_70_OF_200, AT_100_OF_300 = {"ire_gamma": 0.9, "ire_start_step": 70 / 200}, {"ire_start_step": 100 / 300}
SAM_05 = {"gr_r": 0.05, "gr_warmup": "none", "ratio": 1}
IRE_VIT_S = {"model": "vit-s-224", "dataset_name": IMAGENET, "num_train_epochs": 300, "warmup_steps": 30 / 300}
IRE_VIT_S |= {"peak_at_4096": 3e-3, "weight_decay": 0.1, "decay_norms_and_biases": True, "max_grad_norm": 1}
IRE_VIT_S |= {"lr_scheduler_type": "cosine", "rand_augment": [2, 15], "mixup": 0.5, "random_resized_crop": 0.08}
IRE_VIT_S |= {"optim": "adamw_torch_fused", "dropout": 0, "ire_interval": 10, "gr_lambda": 0}

# ---- TVLARS: the released code and its history ----

LARGE = {"num_train_epochs": 100, "weight_decay": 5e-4, "image_mean": [0.485, 0.456, 0.406]}
LARGE |= {"image_std": [0.229, 0.224, 0.225], "gr_lambda": 0}
DECAY = {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.001}
WARMUP = {"warmup_steps": 20 / 100}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0}
#: Batch -> the learning rates of LARS without warmup and of TVLARS.
RATES = {
    512: [1, 2, 3],
    1024: [5, 8, 10],
    2048: [10, 12, 15],
    4096: [12, 15, 17, 20],
    8192: [12, 15, 17, 20, 25, 30],
    16384: [12, 15, 17, 20, 25, 30, 35],
}
LAMBDAS = ["1e-6", "1e-5", "1e-4", "1e-3", "5e-3", "1e-2"]
BATCHES = {"batch": [512, 1024, 2048, 4096, 8192, 16384]}
RESNETS = {"model": ["resnet-18", "resnet-34"]}
FOUR = {
    "LARS": {"optim": "lars", **DECAY, "warmup_steps": 0},
    "LARS with warmup": {"optim": "lars", **DECAY, **WARMUP},
    "LAMB": {"optim": "lamb"},
    "TVLARS": {"optim": "tvlars", **CONSTANT},
}
TUNED = {
    "LARS": FOUR["LARS"],
    "LARS with warmup": {**FOUR["LARS with warmup"], "learning_rate": 0.5, "lr_scaling": "linear"},
    "LARS with warmup, 0.3": {**FOUR["LARS with warmup"], "learning_rate": 0.3, "lr_scaling": "linear"},
    "LARS with warmup, 0.1": {**FOUR["LARS with warmup"], "learning_rate": 0.1, "lr_scaling": "linear"},
    "LAMB": FOUR["LAMB"],
    "TVLARS": FOUR["TVLARS"],
}
AT_ONE_RATE = {arm: ["peak"] for arm in TUNED if arm.startswith(("LARS with", "LAMB"))}
LAMBDA_ARMS = {
    "LARS with warmup": {**FOUR["LARS with warmup"], "peak": 0.5 * 512 / 256},
    "TVLARS": FOUR["TVLARS"],
}
LAMBDA = LARGE | {"model": "resnet-18", "dataset_name": CIFAR, "batch": 512}
IN_THE_PAPER, IN_THE_CODE = (
    "delay_steps=970",  # ten epochs of 50,000 // 512 steps
    "alpha=0.1,delay_steps=0,gamma_min=0,norm_clamp=(0,10),phi_everywhere=False",
)


def lambdas(formula: str) -> dict[str, list[Any]]:
    return {"peak": [1, 2, 3], "optim_args": [f"tv_lambda={value},{formula}" for value in LAMBDAS]}


PUBLISHED: dict[tuple[str, str], Published] = {
    ("gr-table1", "paper"): Published(
        without_optim | {"gr_r": 0.1},
        {
            "no warmup": {"gr_lambda": 0, "warmup_steps": 0},
            "no warmup, GR": {"gr_warmup": "none", "warmup_steps": 0},
            "LR warmup": {"gr_lambda": 0},
            "LR warmup, GR": {"gr_warmup": "none"},
        },
        {"model": VITS, "dataset_name": CIFARS, **OPTIMIZERS},
    ),
    ("gr-table2", "paper"): Published(without_optim, POLICIES, {"model": VITS, "dataset_name": CIFARS, **OPTIMIZERS}),
    ("gr-table3", "paper"): Published(
        GR,
        {
            "no GR": {"gr_lambda": 0},
            **{
                f"r {str(r)[1:]}, lambda/r {str(ratio).removeprefix('0')}": {
                    "gr_r": r,
                    "ratio": ratio,
                    "gr_warmup": "zero",
                }
                for r, ratio in itertools.product((0.05, 0.1), (0.8, 1))
            },
        },
        {"learning_rate": [5e-3, 1e-3, 5e-4], "warmup_steps": [20 / 300, 40 / 300, 80 / 300]},
    ),
    ("gr-table4", "paper"): Published(GR_CHOSEN, POLICIES, {"model": [*SWINS, *CAITS], "dataset_name": CIFARS}),
    ("gr-table5", "paper"): Published({"dataset_name": TINY}, POLICIES, {"model": VITS}),
    ("gr-table5", "paper_imagenet"): Published({"dataset_name": IMAGENET, "model": "swin-tiny-224"}, POLICIES),
    ("label-noise", "paper"): Published(
        SAM, {"no GR": {"gr_lambda": 0}, "vanilla GR": {**SAM_05, "gr_r": 0.1}}, {"label_noise": [0.2, 0.4, 0.6, 0.8]}
    ),
    ("ire-cifar", "paper"): Published(
        IRE_CIFAR | SGD,
        {
            "SGD": {"gr_lambda": 0, "ire_kappa": 0},
            "SGD with IRE": {"gr_lambda": 0, **AT_70_OF_200},
            "SAM": {**SAM_05, "ire_kappa": 0},
            "SAM with IRE": {**SAM_05, **AT_70_OF_200},
        },
        {"model": ["wrn-28-10", "resnet-56"], "dataset_name": CIFARS, "ire_kappa": [1, 2]},
        {"SGD": ["ire_kappa"], "SAM": ["ire_kappa"]},
    ),
    ("ire-vit", "paper"): Published(
        IRE_CIFAR | {"optim": "adamw_torch_fused", "dataset_name": CIFAR_100, "dropout": 0},
        {
            "AdamW": {"gr_lambda": 0, "ire_kappa": 0},
            "AdmIRE": {"gr_lambda": 0, **AT_70_OF_200},
            "SAM": {**SAM_05, "ire_kappa": 0},
            "SAM with IRE": {**SAM_05, **AT_70_OF_200},
        },
        {"model": ["vit-ti", "vit-s"], "ire_kappa": [20, 50]},
        {"AdamW": ["ire_kappa"], "SAM": ["ire_kappa"]},
    ),
    ("ire-imagenet", "paper"): Published(
        IRE_VIT_S,
        {
            "no IRE": {"ire_kappa": 0},
            "IRE": {"ire_kappa": 2, "ire_gamma": 0.8, **AT_100_OF_300},
            "IRE, gamma 0.6": {"ire_kappa": 2, "ire_gamma": 0.6, **AT_100_OF_300},
        },
    ),
    ("ire-imagenet", "paper_resnet50"): Published(
        {"model": "resnet-50", "dataset_name": IMAGENET, "optim": "sgd"},
        {
            "no IRE": {"gr_lambda": 0, "ire_kappa": 0},
            "IRE": {"gr_lambda": 0, "ire_kappa": 1},
            "SAM": {"gr_warmup": "none", "ire_kappa": 0},
            "SAM with IRE": {"gr_warmup": "none", "ire_kappa": 1},
        },
    ),
    **{
        ("ire-heatmap", scale): Published(
            IRE_CIFAR
            | SGD
            | {"model": "wrn-16-8", "dataset_name": CIFAR, "lr_scheduler_type": schedule, "gr_lambda": 0},
            {"SGD": {"ire_kappa": 0}, "SGD with IRE": {"ire_start_step": 70 / 200}},
        )
        for scale, schedule in (("paper", "cosine"), ("paper_constant", "constant"))
    },
    ("tvlars-init", "paper"): Published(
        LARGE | {"model": "resnet-18", "dataset_name": CIFAR},
        FOUR,
        {"weight_init": ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]},
    ),
    ("tvlars-phases", "paper"): Published(
        LARGE | {"model": "resnet-18", "dataset_name": CIFAR},
        {
            "neither": {"optim": "lars", **CONSTANT},
            "warmup alone": {"optim": "lars", "lr_scheduler_type": "constant_with_warmup", **WARMUP},
            "decay alone": FOUR["LARS"],
            "warmup and decay": FOUR["LARS with warmup"],
            "phi (TVLARS)": FOUR["TVLARS"],
        },
    ),
    ("tvlars-lambda", "paper"): Published(
        LAMBDA, LAMBDA_ARMS, lambdas(IN_THE_PAPER), {"LARS with warmup": ["peak", "optim_args"]}
    ),
    ("tvlars-lambda", "paper_code"): Published(
        LAMBDA, LAMBDA_ARMS, lambdas(IN_THE_CODE), {"LARS with warmup": ["peak", "optim_args"]}
    ),
    ("tvlars-batch", "paper"): Published(LARGE, FOUR, {**BATCHES, **RESNETS, "dataset_name": CIFARS}),
    ("tvlars-batch", "paper_tiny_imagenet"): Published(
        LARGE | {"image_size": 64}, FOUR, {**BATCHES, **RESNETS, "dataset_name": [TINY]}
    ),
    **{
        ("tvlars-batch", f"paper_{batch}"): Published(
            LARGE | {"batch": batch}, TUNED, {"peak": rates, **RESNETS, "dataset_name": CIFARS}, AT_ONE_RATE
        )
        for batch, rates in RATES.items()
    },
}
#: Scales of comparisons that no paper has, with what they keep of one.
OURS: dict[tuple[str, str], dict[str, Any]] = {
    ("gr-harmful", "paper"): GR | {"dataset_name": CIFAR, "learning_rate": 1e-3},
    ("gr-figures", "paper"): GR | {"dataset_name": CIFAR, "learning_rate": 1e-3, "gr_r": 0.1},
    ("label-noise", "paper_vit"): GR | {"dataset_name": CIFAR, "learning_rate": 1e-3},
    ("cost-frontier", "paper"): SAM,
}
#: Words that say of a setting that it is not a paper's.
SAID = (
    "not published",
    "never published",
    "was published in",
    "is ours",
    "are ours",
    "as ours",
    "never run",
    "not tuned",
)
ALL_OURS = {"gr-table5", "ire-vit", "ire-heatmap", "tvlars-init", "tvlars-phases", "tvlars-batch", "label-noise"}


def settings(run: Run) -> dict[str, Any]:
    """The flags of a run as its script resolves them: defaults, the recipe, the command line."""
    recipe, *words = run.arguments
    given = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    kinds = (train_vit.ModelArguments, train_vit.DataArguments, train_vit.ScriptConfig)
    defaults = {
        f.name: getattr(f.default, "value", f.default) for kind in kinds for f in kind.__dataclass_fields__.values()
    }
    found = {**defaults, **recipes.under(given, recipes.read_recipe(Path(recipe), set(defaults))), **given}
    rate, batch = float(found["learning_rate"]), int(found["per_device_train_batch_size"])
    scale = {"linear": 1 / 256, "none": 1 / batch}[found["lr_scaling"]]
    degree = found["gr_r"] if found["gr_lambda"] in (None, "None") else found["gr_lambda"]
    return found | {
        "batch": batch,
        "peak": rate * scale * batch,
        "peak_at_4096": rate * scale * 4096,
        "ratio": float(degree) / float(found["gr_r"]),
        "min_lr_rate": json.loads(found["lr_scheduler_kwargs"] or "{}").get("min_lr_rate"),
    }


def is_same(value: Any, published: Any) -> bool:
    if isinstance(published, bool | str | list) or published is None:
        return str(value).lower() == str(published).lower()
    return float(value) == pytest.approx(published, rel=1e-6)


def differences(run: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """flag -> (value, published value)"""
    return {key: (run[key], value) for key, value in published.items() if not is_same(run[key], value)}


def cells_of(published: Published, arm: str) -> list[dict[str, Any]]:
    axes = {axis: values for axis, values in published.axes.items() if axis not in published.without.get(arm, [])}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def runs_of(name: str, scale: str) -> list[Run]:
    grid = load_grid(GRIDS / f"{name}.yaml", scale)
    return [run for run in expand(grid, Path("out"), RECIPES) if run.point["seed"] == grid.seeds[0]]


@pytest.mark.parametrize(("name", "scale"), PUBLISHED, ids=map("-".join, PUBLISHED))
def test_a_grid_has_the_cells_and_the_settings_that_were_published(name, scale):
    published = PUBLISHED[name, scale]
    cells = [(arm, cell) for arm in published.arms for cell in cells_of(published, arm)]
    found = [(run.point["arm"], settings(run)) for run in runs_of(name, scale)]
    for arm, cell in cells:
        runs = [run for its_arm, run in found if its_arm == arm and not differences(run, cell)]
        assert runs, f"no run of {arm} has {cell}"
        for run in runs:
            assert not differences(run, published.everywhere | published.arms[arm]), f"{arm}, {cell}"
    if name != "label-noise":  # it has ascents of ours, too
        assert {arm for arm, _ in found} == published.arms.keys()
        assert not published.axes or len(found) == len(cells)


@pytest.mark.parametrize(("name", "scale"), OURS, ids=map("-".join, OURS))
def test_what_no_paper_compared_keeps_its_settings(name, scale):
    """Arms may differ in length: twice as long without GR."""
    for run in map(settings, runs_of(name, scale)):
        assert differences(run, OURS[name, scale]).keys() <= (
            {"num_train_epochs"} if run["gr_lambda"] == "0" else set()
        )


def test_no_paper_scale_of_an_image_grid_is_missing():
    grids = {path: yaml.safe_load(path.read_text()) for path in GRIDS.glob("*.yaml")}
    scales = {
        (path.stem, scale)
        for path, grid in grids.items()
        if grid["script"] == "train_vit.py"
        for scale in grid["scales"]
        if scale.startswith("paper")
    }
    assert scales == PUBLISHED.keys() | OURS.keys()


@pytest.mark.parametrize("name", sorted(ALL_OURS | {name for name, _ in OURS}))
def test_a_grid_says_which_settings_were_not_published(name):
    grid: Grid = load_grid(GRIDS / f"{name}.yaml", "paper")
    texts = [(GRIDS / f"{name}.yaml").read_text(), (RECIPES / str(grid.recipe)).read_text()]
    comments = " ".join(line.lstrip(" #") for text in texts for line in text.splitlines() if "#" in line)
    assert any(words in comments for words in SAID), comments
