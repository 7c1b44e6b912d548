"""Two real processes under DDP (gloo): every scope against its own reference, and the ranks against each other."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toys
from distributed_worker import CASES, IRE_CASES, LEARNING_RATE, OPTIMIZER_CASES, STEPS
from hf_gr import GRConfig, GRTrainer
from reference import flat_masks, regularized_gradient, sampled_label_gradient
from test_trainer import relative_error_of_path, sum_of_token_losses

pytestmark = pytest.mark.distributed
TESTS = Path(__file__).parent
RANKS, BATCH, RADIUS = 2, 2, 0.1


def reference_path(scope: str, accumulation: int, degree: float) -> list[torch.Tensor]:
    """SGD on the gradient that the scope defines: which micro-batches share a direction, and how they are averaged."""
    model, data = toys.llama(), toys.text(24)
    batches = [data[k * BATCH : (k + 1) * BATCH] for k in range(len(data) // BATCH)]
    path = [toys.weights(model)]
    for step in range(STEPS):
        # accelerate deals batches to the ranks in turn, as cards.
        first = step * accumulation * RANKS
        window = [[batches[first + k * RANKS + rank] for k in range(accumulation)] for rank in range(RANKS)]
        count = sum(int((e["labels"][1:] != -100).sum()) for rank in window for batch in rank for e in batch)
        shards = {
            "global": [[batch for rank in window for batch in rank]],
            "local": window,
            "micro": [[batch] for rank in window for batch in rank],
        }[scope]

        def loss_of(shard, count=count):
            return lambda model: sum(sum_of_token_losses(model, batch) for batch in shard) / count

        # The loss of the step is the sum of the shards' losses, each a share of the same token count.
        g = sum(regularized_gradient(model, loss_of(shard), degree * RADIUS, RADIUS) for shard in shards)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(toys.weights(model) - LEARNING_RATE * g, model.parameters())
        path.append(toys.weights(model))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--standalone", str(TESTS / "distributed_worker.py"), str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def paths(results):
    return results["paths"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_scope_equals_its_reference(case, paths):
    # float32, sums in another order; the scopes themselves differ by more than 1e-2.
    assert relative_error_of_path(paths[case], reference_path(*case)) <= 1e-5


def test_scopes_are_different_algorithms(paths):
    for a, b in (("global", "local"), ("local", "micro")):
        assert relative_error_of_path(paths[a, 2, 1.0], paths[b, 2, 1.0]) > 1e-3


@pytest.mark.parametrize("case", IRE_CASES, ids=lambda case: f"accumulation {case[0]}, lambda {case[1]}")
def test_estimate_of_ire_is_that_of_all_processes(case, results):
    """The worker has compared the ranks; here what they agree on is compared with the reference."""
    accumulation, data = case[0], toys.text(24)
    batches = [
        {key: torch.stack([e[key] for e in data[k * BATCH : (k + 1) * BATCH]]) for key in data[0]}
        for k in range(len(data) // BATCH)
    ]
    kept = results["estimates"][case]
    assert [update["step"] for update in kept] == [0, 2]
    for update in kept:
        model = toys.llama()
        torch.nn.utils.vector_to_parameters(update["weights"], model.parameters())
        first = update["step"] * accumulation * RANKS
        per_rank = [[batches[first + k * RANKS + rank] for k in range(accumulation)] for rank in range(RANKS)]
        expected = sampled_label_gradient(model, per_rank, 5, update["step"])
        for estimate, reference in zip(update["estimate"], expected, strict=True):
            torch.testing.assert_close(estimate, reference, rtol=1e-4, atol=1e-7)  # float32, summed in another order
        for mask, reference in zip(update["masks"], flat_masks(update["estimate"], 0.6), strict=True):
            assert torch.equal(mask.bool(), reference)


@pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_optimizers_step_as_in_one_process(case, results, tmp_path):
    """Two processes, or one that accumulates twice as long: the same total batch, the same scaled rate and floor."""
    flags = {
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gr_warmup": "none",
        **OPTIMIZER_CASES[case],
    }
    flags["gradient_accumulation_steps"] *= RANKS
    recorder = toys.PathRecorder()
    args = GRConfig(**toys.arguments(tmp_path, **flags))
    GRTrainer(toys.llama(), args, train_dataset=toys.text(24), callbacks=[recorder]).train()
    # float32; LAMB divides by the root of second moments that are nearly 0 in places.
    assert relative_error_of_path(results["optimizers"][case], recorder.path) <= (1e-3 if case[0] == "lamb" else 1e-5)
