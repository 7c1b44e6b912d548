"""Every method, in float32 on the device, against itself in float64 on the CPU, where others test it against formulas.

The cases come from the project's own tables, so that a new entry is tested here, too.
"""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from helpers import toys
from helpers.training import relative_error_of_path, run
from hf_gr import GRTrainer
from hf_gr.config import GR_SCOPES
from hf_gr.optim import OPTIMIZERS
from hf_gr.optim.ascents import ASCENTS
from hf_gr.optim.ire import MASKS, SETTINGS
from hf_gr.optim.radius_rules import RADIUS_RULES
from hf_gr.optim.second_passes import SECOND_PASSES

#: Of the path of the weights. The loss of a Llama is computed in float32, whatever its weights are, and what Muon
#: orthogonalizes is rounded to bfloat16.
TOLERANCE, WITH_MUON = 1e-3, 0.05
SHARED = {
    "max_steps": 2,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "gradient_accumulation_steps": 2,
    "gr_warmup": "none",
    "ire_start_step": 0,
    "ire_interval": 1,
}
PLAIN, IRE = {"gr_lambda": 0}, {"gr_lambda": 0, "ire_kappa": 2.0}
#: A layer-wise optimizer moves a share of each weight. Of AdamW, eps keeps it from magnifying the smallest gradients.
BY_NAME = {"optim_args": None, "weight_decay": 0.1}
ADAMW = {**BY_NAME, "optim": "adamw_torch_fused", "adam_epsilon": 1e-3, "learning_rate": 1e-2}
CASES = {
    **{f"ascent {name}": {"gr_ascent": name} for name in ASCENTS},
    **{f"radius {name}": {"gr_radius_rule": name, "gr_lambda": 0.05} for name in RADIUS_RULES},
    **{f"second pass {name}": {"gr_second_pass_kind": name, "gr_lambda": 0.05} for name in SECOND_PASSES},
    **{f"scope {name}": {"gr_scope": name, "gr_lambda": 0.05} for name in GR_SCOPES},
    "clip": {"gr_clip": 0.5, "gr_lambda": 0.05},
    "reuse": {"gr_interval": 2, "gr_reuse": 0.7},
    "momentum between": {"gr_interval": 2, "gr_momentum_r": 0.3},
    **{f"IRE {name}": {**IRE, "ire_mask": name} for name in MASKS if name != "random"},  # each device draws its own
    **{f"IRE {name}": {**IRE, "ire_scope": name} for name in SETTINGS["scope"]},
    "IRE average": {**IRE, "ire_beta": 0.9},
    "GR-AdmIRE": {**ADAMW, "ire_kappa": 2.0},
    **{f"optimizer {name}": {**BY_NAME, **PLAIN, "optim": name} for name in OPTIMIZERS},
    **{f"SAM-{name}": {**BY_NAME, "optim": name} for name in OPTIMIZERS},
}


class OwnLabels(GRTrainer):
    """The estimate of IRE is of the labels themselves: drawn ones depend on the device."""

    def ire_sampled_losses(self, model, inputs, generator):
        logits = model(inputs["input_ids"]).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="none")


def tolerance_of(case: str) -> float:
    return WITH_MUON if "muon" in case else TOLERANCE


def path_of(model, folder, **flags) -> list[torch.Tensor]:
    recorder = toys.PathRecorder()
    run(model, toys.text(), folder, cls=OwnLabels, callbacks=[recorder], **{**SHARED, **flags})
    return [weights.double().cpu() for weights in recorder.path]


@cache
def reference(case: str, folder: str) -> list[torch.Tensor]:
    return path_of(toys.llama().double(), folder, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_float32_on_the_device_is_float64_on_the_cpu(case, device, tmp_path, tmp_path_factory):
    expected = reference(case, str(tmp_path_factory.getbasetemp()))
    path = path_of(toys.llama(), tmp_path, use_cpu=device == "cpu", **CASES[case])
    error = relative_error_of_path(path, expected)
    assert error < tolerance_of(case), error


def test_the_cases_differ(tmp_path_factory):
    """Otherwise the tolerance would hide a method that the device leaves out."""
    folder = str(tmp_path_factory.getbasetemp())
    plain = path_of(toys.llama().double(), folder, **PLAIN)
    distances = {case: relative_error_of_path(plain, reference(case, folder)) for case in CASES}
    assert {case: d for case, d in distances.items() if d < 3 * tolerance_of(case)} == {}
