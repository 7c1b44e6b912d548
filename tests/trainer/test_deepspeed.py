"""Why DeepSpeed is refused: what it does in a step, on two gloo processes. Skipped where it is not installed."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from helpers import TESTS

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += [TESTS / "helpers" / "deepspeed_worker.py", folder]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "0.pt")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_it_steps_within_the_backward_pass(results, stage):
    """So there is nowhere to put a second pass, nor to restore the weights, between the gradient and the step."""
    for ends_step, moved, has_gradients in results["seen"][stage]:
        assert moved == ends_step
        assert not (ends_step and has_gradients)


def test_from_stage_1_on_the_optimizer_steps_shards(results):
    """So its momentum is not that of a parameter, and a norm is not that of a layer."""
    assert results["has_shards"] == {0: False, 1: True, 2: True}


def test_without_gr_the_run_is_that_of_trainer(results):
    assert torch.equal(results["weights"], results["plain"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GR", "Gradient regularization cannot be used with DeepSpeed.*FSDP2.*or set gr_lambda=0"),
        ("momentum", "before .* perturbed weights be restored.*FSDP2"),
        ("IRE", "IRE cannot be used with DeepSpeed.*or set ire_kappa=0"),
        ("LARS", "optim=lars cannot be used with .*DeepSpeed"),
    ],
)
def test_refused(results, name, message):
    assert re.search(message, results["refused"][name])
