"""What comes with a GPU: other precisions, memory layouts and random generators, compiled and sharded models."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils.import_utils import enable_tf32

from helpers import toys
from helpers.distributed_worker import RanksAgree, Sharded
from helpers.training import Normalized, relative_error_of_path, run
from hf_gr import GRTrainer
from hf_gr.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

#: Of the path of the weights in float32.
TOLERANCE = 1e-3
SHARED = {
    "max_steps": 3,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "gradient_accumulation_steps": 2,
    "gr_warmup": "none",
    "gr_lambda": 0.05,
}
#: Without an estimate, whose labels each device draws with numbers of its own.
UNIFORM_IRE = {"ire_kappa": 2.0, "ire_start_step": 0, "ire_mask": "uniform"}
LARS = {"optim": "lars", "optim_args": None}


def train(model: nn.Module, data: list[dict], folder, device: str = "cpu", **flags) -> tuple[GRTrainer, list[Tensor]]:
    recorder = RanksAgree()
    flags = {**SHARED, "use_cpu": device == "cpu", **flags}
    trainer = run(model, data, folder, callbacks=[recorder], **flags)
    return trainer, [weights.double().cpu() for weights in recorder.path]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return train(toys.llama().double(), toys.text(), tmp_path_factory.mktemp("exact"))[1]


# ---- Precision ----


class Overflow(GRTrainer):
    """The loss of the second step is infinite in one of its passes, if one is named."""

    in_second_pass: bool | None = None

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        overflows = self.state.global_step == 1 and self.gr_second_pass == self.in_second_pass
        return loss * float("inf") if overflows else loss


def in_fp16(device: str, in_second_pass: bool | None = None) -> dict:
    """With accelerate's own scaler, and on a CPU with one that is put in."""
    bases = (Overflow, toys.ScaledTrainer) if device == "cpu" else (Overflow,)
    return {"cls": type("Scaled", bases, {"in_second_pass": in_second_pass}), "fp16": device != "cpu"}


def test_fp16(device, exact, tmp_path):
    _, path = train(toys.llama(), toys.text(), tmp_path, device, **in_fp16(device))
    assert relative_error_of_path(path, exact) < 0.02


@pytest.mark.parametrize("in_second_pass", [False, True])
def test_an_overflow_in_fp16_skips_the_step(in_second_pass, device, tmp_path):
    trainer, path = train(toys.llama(), toys.text(), tmp_path, device, **in_fp16(device, in_second_pass))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(path)] == [False, True, False]
    scaler = trainer.accelerator.scaler
    assert scaler.get_scale() == scaler._init_scale / 2


def test_bf16(device, exact, tmp_path):
    trainer, path = train(toys.llama(), toys.text(), tmp_path, device, bf16=True)
    assert relative_error_of_path(path, exact) < 0.05
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("is_on", "tolerance"), [(False, TOLERANCE), (True, 0.02)])
def test_tf32(is_on, tolerance, device, exact, tmp_path):
    enable_tf32(is_on)  # as the flag tf32 does where it is not refused
    _, path = train(toys.llama(), toys.text(), tmp_path, device)
    assert relative_error_of_path(path, exact) < tolerance


# ---- Models ----


def resnet(memory_format: torch.memory_format) -> nn.Module:
    set_seed(0)
    config = CifarResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10)
    return CifarResNetForImageClassification(config).to(memory_format=memory_format)


@pytest.mark.parametrize("flags", [{}, UNIFORM_IRE, LARS], ids=["GR", "IRE", "LARS"])
def test_channels_last(flags, device, tmp_path):
    flags = {"per_device_train_batch_size": 4, **flags}
    trainer, path = train(resnet(torch.channels_last), toys.images(), tmp_path, device, **flags)
    _, expected = train(resnet(torch.contiguous_format), toys.images(), tmp_path, **flags)
    assert relative_error_of_path(path, expected) < TOLERANCE
    kernels = [p for p in trainer.model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_compiled(device, tmp_path):
    set_seed(0)
    data = [{"x": torch.randn(3), "labels": torch.tensor(i % 2)} for i in range(24)]
    model = Normalized()
    _, expected = train(copy.deepcopy(model), data, tmp_path)
    backend = "inductor" if device == "cuda" else "aot_eager"
    flags = {"torch_compile": True, "torch_compile_backend": backend, "tf32": False}
    _, path = train(model, data, tmp_path, device, **flags)
    assert relative_error_of_path(path, expected) < TOLERANCE


# ---- Random numbers ----


def test_both_passes_drop_the_same(device, tmp_path):
    dropped: dict[bool, list[Tensor]] = {False: [], True: []}
    model = toys.vit(dropout=0.3)

    class Watched(GRTrainer):
        def create_optimizer(self, *args, **kwargs):
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.register_forward_hook(lambda *seen: dropped[self.gr_second_pass].append(seen[-1] == 0))
            return super().create_optimizer(*args, **kwargs)

    # Attention drops without a module of its own: at a tiny radius, the same random numbers give the same gradient.
    trainer, _ = train(model, toys.images(), tmp_path, device, cls=Watched, gr_r=1e-4, gr_lambda=1e-4)
    for log in trainer.state.log_history[:-1]:
        assert log["gr_perturbed_grad_norm"] == pytest.approx(log["gr_grad_norm"], rel=1e-3)
    masks = [torch.cat([mask.flatten() for mask in dropped[is_second]]) for is_second in (False, True)]
    assert torch.equal(*masks)
    assert 0.2 < masks[0].float().mean() < 0.4
    assert not torch.equal(dropped[False][0], dropped[False][len(dropped[False]) // 2])


def test_the_random_numbers_go_on_as_without_a_second_pass(device, tmp_path):
    states = []
    for degree in (0.0, 0.05):
        train(toys.vit(dropout=0.3), toys.images(), tmp_path, device, gr_lambda=degree)
        states.append(torch.get_rng_state() if device == "cpu" else torch.get_device_module(device).get_rng_state())
    assert torch.equal(*states)


# ---- Shards ----


@contextmanager
def group_of_one(monkeypatch):
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    # Without a number of threads, accelerate sets one and warns.
    for name, value in {**names, "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "flags",
    [{"gr_ascent": "adaptive"}, {"gr_ascent": "momentum", "gr_lambda": None}, UNIFORM_IRE, LARS],
    ids=["GR", "MSAM", "IRE", "LARS"],
)
def test_fsdp2(flags, device, tmp_path, monkeypatch):
    if device == "mps":
        pytest.skip("torch has no process group for MPS")
    _, expected = train(toys.llama().double(), toys.text(), tmp_path, **flags)
    backend = "gloo" if device == "cpu" else "nccl"
    with group_of_one(monkeypatch):
        _, path = train(toys.llama(), toys.text(), tmp_path, device, cls=Sharded, ddp_backend=backend, **flags)
    assert relative_error_of_path(path, expected) < TOLERANCE
