"""Two and four real processes (gloo): DDP and FSDP2 against references, and the ranks against each other."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers import TESTS, distributed_worker, forks, own_loop, toys
from helpers.distributed_worker import (
    ASCENT_CASES,
    BARLOW_BATCH,
    BARLOW_CASES,
    CASES,
    EXAMPLES,
    FSDP_CASES,
    IRE_CASES,
    LEARNING_RATE,
    OPTIMIZER_CASES,
    RESUME,
    SHARDED_CASES,
    SHARDED_IRE_CASES,
    SHARDED_OPTIMIZER_CASES,
    SHARDED_RUNS,
    STEPS,
    barlow_of,
    diagnostics_of,
    memorization_of,
    sharpness_of,
    trainer_of,
)
from helpers.reference import flat_masks, regularized_gradient, sampled_label_gradient
from helpers.training import relative_error_of_path, sum_of_token_losses
from hf_gr import GRConfig, GRTrainer

pytestmark = pytest.mark.distributed
RANKS, BATCH, RADIUS = 2, 2, 0.1
#: Of the worker, that two processes run.
SUITES = ("scopes", "ascents", "barlow", "ire", "optimizers", "overflow", "resume", "loop", "memorization",
          "diagnostics", "sharpness", "stream")  # fmt: skip
#: float32: sums in another order; the scopes themselves differ by more than 1e-3. bf16: 8 bits, in another order.
TOLERANCE = {"float32": 1e-5, "scaled": 1e-5, "bf16": 2e-2}


def reference_path(scope: str, accumulation: int, degree: float, precision: str, ranks: int) -> list[torch.Tensor]:
    """SGD on the gradient that the scope defines: which micro-batches share a direction, and how they are averaged."""
    model, data = toys.llama(), toys.text(EXAMPLES)
    batches = [data[k * BATCH : (k + 1) * BATCH] for k in range(len(data) // BATCH)]
    path = [toys.weights(model)]
    for step in range(STEPS):
        # accelerate deals batches to the ranks in turn, as cards.
        first = step * accumulation * ranks
        window = [[batches[first + k * ranks + rank] for k in range(accumulation)] for rank in range(ranks)]
        count = sum(int((e["labels"][1:] != -100).sum()) for rank in window for batch in rank for e in batch)
        shards = {
            "global": [[batch for rank in window for batch in rank]],
            "local": window,
            "micro": [[batch] for rank in window for batch in rank],
        }[scope]

        def loss_of(shard, count=count):
            def loss(model):
                with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                    return sum(sum_of_token_losses(model, batch) for batch in shard) / count

            return loss

        # The loss of the step is the sum of the shards' losses, each a share of the same token count.
        g = sum(regularized_gradient(model, loss_of(shard), degree * RADIUS, RADIUS) for shard in shards)
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(toys.weights(model) - LEARNING_RATE * g, model.parameters())
        path.append(toys.weights(model))
    return path


def launch(folder: Path, processes: int, *suites: str) -> dict:
    forks.run(distributed_worker.main, str(folder), *suites, processes=processes)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {
        "one": alone(folder / "one"),
        **launch(folder, 2, *SUITES),
        "from_two": alone(folder / "resumed", folder / "two" / "checkpoint-2"),
    }


def alone(output_dir: Path, checkpoint: Path | None = None) -> list[torch.Tensor]:
    """The path of a run of one process that has the batches of two."""
    recorder = toys.PathRecorder()
    flags = {"ddp_backend": None, "gradient_accumulation_steps": RANKS, **RESUME}
    trainer = trainer_of(str(output_dir), callbacks=[recorder], **flags)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return recorder.path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    found = launch(folder, 2, "fsdp", "sharded", "shards", "overflow seen late")
    return {**found["fsdp"], "methods": found["sharded"], "shards": found["shards"], "folder": folder}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_scope_equals_its_reference(case, results):
    assert relative_error_of_path(results["scopes"][case], reference_path(*case, RANKS)) <= TOLERANCE[case[-1]]


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_diagnostics_are_those_of_one_process(kind, results, sharded, tmp_path):
    """Adam amplifies the order of the sums in gradients that are almost 0, which count as much as the others here."""
    found = results["diagnostics"] if kind == "replicated" else sharded["diagnostics"]
    alone = diagnostics_of(str(tmp_path), ddp_backend=None, gradient_accumulation_steps=RANKS)
    assert [entry.keys() for entry in found] == [entry.keys() for entry in alone] and len(found) == STEPS + 1
    for mine, expected in zip(found, alone, strict=True):
        assert mine == pytest.approx(expected, rel=1e-3)


def test_processes_read_different_documents_and_resume_with_the_next(results):
    whole, rest = results["stream"]["whole"], results["stream"]["rest"]
    documents = [number for rank in whole["documents"] for step in rank for number in step]
    assert len(documents) == RANKS * 6 * 4 == len(set(documents))
    assert rest["documents"] == [rank[3:] for rank in whole["documents"]]
    assert torch.equal(rest["weights"], whole["weights"])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four"), 4, "float32", "barlow")


@pytest.mark.slow
def test_sharded_parameters_step_as_ordinary_ones_on_four_processes(tmp_path):
    """And on a mesh of two by two, replicas of shards (HSDP) or shards of shards."""
    require_same_as_ordinary(launch(tmp_path, 4, "shards")["shards"])


@pytest.mark.slow
def test_four_processes(four):
    for case, path in four["float32"].items():
        assert relative_error_of_path(path, reference_path(*case, 4)) <= TOLERANCE["float32"], case


def test_loop_of_the_readme_equals_its_reference(results):
    ranks = results["loop"]
    assert all(torch.equal(ranks[0]["weights"], rank["weights"]) for rank in ranks)
    assert ranks[0]["batches"][0] != ranks[1]["batches"][0]
    assert own_loop.relative_error(ranks[0]["weights"], own_loop.reference([r["batches"] for r in ranks])) < 1e-13


def test_scopes_are_different_algorithms(results):
    paths = results["scopes"]
    for a, b in (("global", "local"), ("local", "micro")):
        assert relative_error_of_path(paths[a, 3, 1.0, "float32"], paths[b, 3, 1.0, "float32"]) > 1e-3


@pytest.mark.parametrize("case", FSDP_CASES, ids=lambda case: "-".join(map(str, case)))
def test_fsdp2_equals_the_reference(case, sharded):
    """The worker has checked that the parameters are sharded (DTensor)."""
    assert relative_error_of_path(sharded[case], reference_path("global", *case, RANKS)) <= TOLERANCE[case[-1]]


def test_fsdp2_resumes_bit_identically(sharded):
    assert len(sharded["whole"]) == 5 and len(sharded["resumed"]) == 3
    for whole, resumed in zip(sharded["whole"][3:], sharded["resumed"][1:], strict=True):
        assert torch.equal(whole, resumed)


def test_fsdp2_saves_one_model(sharded):
    """Checkpoints are in parts; what `save_model` writes is not."""
    assert (sharded["folder"] / "checkpoint-2" / "pytorch_model_fsdp_0" / ".metadata").exists()
    model = LlamaForCausalLM.from_pretrained(sharded["folder"] / "final")
    assert torch.equal(toys.weights(model), sharded["whole"][-1])


@pytest.mark.parametrize(
    ("kind", "case"),
    [*(("replicated", case) for case in IRE_CASES), *(("sharded", case) for case in SHARDED_IRE_CASES)],
    ids=str,
)
def test_estimate_of_ire_is_that_of_all_processes(kind, case, request):
    """The worker has compared the ranks; here what they agree on is compared with the reference. Of sharded parameters
    it has put together the estimate and the masks."""
    accumulation, data = case[0], toys.text(EXAMPLES)
    batches = [
        {key: torch.stack([e[key] for e in data[k * BATCH : (k + 1) * BATCH]]) for key in data[0]}
        for k in range(len(data) // BATCH)
    ]
    kept = (
        request.getfixturevalue("results")["ire"][case]
        if kind == "replicated"
        else request.getfixturevalue("sharded")["methods"]["ire"][case]
    )
    assert [update["step"] for update in kept] == [0, 2]
    for update in kept:
        flat = sum(int(mask.sum()) for mask in update["masks"])
        assert update["fraction"] == flat / sum(mask.numel() for mask in update["masks"])
        model = toys.llama()
        torch.nn.utils.vector_to_parameters(update["weights"], model.parameters())
        first = update["step"] * accumulation * RANKS
        per_rank = [[batches[first + k * RANKS + rank] for k in range(accumulation)] for rank in range(RANKS)]
        expected = sampled_label_gradient(model, per_rank, 5, update["step"])
        for estimate, reference in zip(update["estimate"], expected, strict=True):
            torch.testing.assert_close(estimate, reference, rtol=1e-4, atol=1e-7)  # float32, summed in another order
        for mask, reference in zip(update["masks"], flat_masks(update["estimate"], 0.6), strict=True):
            assert torch.equal(mask.bool(), reference)


def path_of_one_process(folder: Path, **flags) -> list[torch.Tensor]:
    """One process that accumulates twice as long as two: the same total batch, the same scaled rate and floor."""
    flags = {
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gr_warmup": "none",
        **flags,
    }
    flags["gradient_accumulation_steps"] *= RANKS
    recorder = toys.PathRecorder()
    args = GRConfig(**toys.arguments(folder, **flags))
    GRTrainer(toys.llama(), args, train_dataset=toys.text(EXAMPLES), callbacks=[recorder]).train()
    return recorder.path


@pytest.mark.parametrize("case", OPTIMIZER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_optimizers_step_as_in_one_process(case, results, tmp_path):
    expected = path_of_one_process(tmp_path, **{**OPTIMIZER_CASES[case], "layer_statistics_steps": 0})
    # float32; LAMB divides by the root of second moments that are nearly 0 in places.
    assert relative_error_of_path(results["optimizers"][case], expected) <= (1e-3 if case[0] == "lamb" else 1e-5)


@pytest.mark.parametrize("case", SHARDED_OPTIMIZER_CASES, ids=lambda case: "-".join(map(str, case)))
def test_optimizers_of_sharded_parameters(case, sharded, tmp_path):
    flags = {**OPTIMIZER_CASES[case], "layer_statistics_steps": 0}
    found = sharded["methods"]["optimizers"][case]
    assert relative_error_of_path(found, path_of_one_process(tmp_path, **flags)) <= (
        1e-3 if case[0] == "lamb" else 1e-5
    )


@pytest.mark.parametrize("name", SHARDED_RUNS)
def test_methods_of_sharded_parameters_resume_bitwise(name, sharded):
    whole, resumed = sharded["methods"]["whole"][name], sharded["methods"]["resumed"][name]
    assert len(whole) == 6 and len(resumed) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not torch.equal(whole[3], whole[4])


def test_what_cannot_be_right_with_sharded_parameters_is_refused(sharded):
    refused = sharded["methods"]["refused"]
    assert "optim=muon cannot be used with FSDP: each process holds only a part" in refused["muon"]
    assert "layer_statistics_steps=1 cannot be used with FSDP" in refused["layers"]
    assert "the coordinates that IRE had chosen, in the folder ire, are missing" in refused["lost masks"]


def require_same_as_ordinary(found: dict) -> None:
    for case, of_optimizer in found["optimizers"].items():
        errors = [of_optimizer[key] for key in ("weights", "state", "rates")]
        assert max(errors) < 1e-6, (case, errors)  # float32; a norm is summed in another order
        # LARS and its like reduce once per step and group; a mesh sharded along two dimensions, along each.
        expected = {"copies": 0, "blocks": 2}.get(case[1], 1)
        assert of_optimizer["placements"] and of_optimizer["all_reduces"] == expected, case
    for case, same in found["masks"].items():
        assert all(same.values()), (case, same)


def test_sharded_parameters_step_as_ordinary_ones(sharded):
    """Rows that do not divide evenly, processes without any, replicas: weights, state, rates; masks bit for bit."""
    require_same_as_ordinary(sharded["shards"])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_barlow_twins_trains_as_in_one_process(processes, request, tmp_path):
    """In float64: the loss, BatchNorm and their gradients are those of the global batch."""
    found = request.getfixturevalue("results" if processes == 2 else "four")["barlow"]
    for case, flags in BARLOW_CASES.items():
        expected = barlow_of(str(tmp_path), per_device_train_batch_size=BARLOW_BATCH, **flags)
        assert len(found[case]["logs"]) == STEPS and found[case]["state"].keys() == expected["state"].keys()
        for mine, alone in zip(found[case]["logs"], expected["logs"], strict=True):
            assert mine == pytest.approx(alone, rel=1e-6)  # some are logged in float32
        for name, value in expected["state"].items():
            torch.testing.assert_close(found[case]["state"][name], value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", ASCENT_CASES)
def test_ascents_step_as_in_one_process(case, results, tmp_path):
    """The worker has checked that both processes have the same bits after each step."""
    expected = path_of_one_process(tmp_path, **ASCENT_CASES[case])
    assert relative_error_of_path(results["ascents"][case], expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize("case", SHARDED_CASES)
def test_ascents_of_sharded_parameters(case, sharded, tmp_path):
    expected = path_of_one_process(tmp_path, **ASCENT_CASES[case])
    assert relative_error_of_path(sharded["ascents"][case], expected) <= TOLERANCE["float32"]


def test_reuse_of_sharded_parameters_is_refused(sharded):
    assert "cannot be used with gr_reuse and FSDP" in sharded["refused"]


@pytest.mark.parametrize(("whole", "resumed"), [("one", "from_one"), ("two", "from_two")])
def test_another_number_of_processes_resumes(whole, resumed, results):
    """Weights, optimizer, schedule and step go on: the steps are those of the run that was interrupted."""
    paths = {**results, **results["resume"]}
    assert torch.equal(paths[whole][2], paths[resumed][0])
    assert relative_error_of_path(paths[resumed], paths[whole][2:]) <= TOLERANCE["float32"]


def test_memorization_is_counted_on_all_processes(results, tmp_path):
    shares = memorization_of(str(tmp_path), per_device_train_batch_size=2 * RANKS)
    assert results["memorization"] == shares  # quotients of the same counts
    assert len(shares) == 2 and shares[0] != shares[1]


@pytest.mark.parametrize(("suite", "batches", "error"), [("results", 4, 1e-4), ("sharded", 2, 2e-3)])
def test_sharpness_is_that_of_one_process(suite, batches, error, request, tmp_path):
    """During training and after it. Sharded parameters have central differences in float32; a rise of the loss has the
    rounding of a loss of 4, and residuals are themselves errors."""
    (logged, after), expected = (
        request.getfixturevalue(suite)["sharpness"],
        sharpness_of(str(tmp_path), batches=batches, ddp_backend=None),
    )
    assert len(after) == 7 and expected[0] == expected[1]
    for found in (logged, after):
        assert found.keys() == expected[1].keys()
        residuals = [values.pop("sharpness_top_error") for values in (found, expected[1].copy())]
        assert found == pytest.approx({key: expected[1][key] for key in found}, rel=error, abs=1e-6)
        assert max(residuals) <= 1e-3 * found["sharpness_top"]


def ends(folder: Path, *runs: str) -> list[int]:
    command = [sys.executable, str(TESTS / "helpers" / "ending_worker.py"), str(folder), *runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    return [int(code) for code in done.stdout.splitlines()[-1].split()]


def test_no_thread_of_gloo_outlives_a_finished_run(tmp_path):
    """One that does may need the interpreter's lock while the interpreter is taken down, which aborts the process."""
    assert ends(tmp_path, "returns", "destroys the group") == [0] * 4


@pytest.mark.slow
def test_twenty_runs_under_load_end_with_zero(tmp_path):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        assert ends(tmp_path, *["starved"] * 20) == [0] * 40
    finally:
        for process in busy:
            process.kill()
            process.wait()
