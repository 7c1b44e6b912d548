"""`trainer.sharpness` and `SharpnessCallback`: the trainer's own loss on fixed batches; the run stays as it is."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers import toys
from helpers.training import run
from hf_gr import SharpnessCallback
from hf_gr.analysis import average_sharpness, hessian_trace, sam_sharpness, top_hessian_eigenvalue
from hf_gr.analysis.curvature import QUANTITIES
from hf_gr.trainer.sharpness import as_logs

FEW = {"trace": {"num_samples": 2}, "average": {"num_samples": 2}}
CHEAP = {"quantities": ("sam", "average"), "average": {"num_samples": 2}}


def batch_of(images):
    return {"pixel_values": torch.stack([image["pixel_values"] for image in images]),
            "labels": torch.tensor([image["labels"] for image in images])}  # fmt: skip


def expected(model, batches, loss):
    return {
        "sam": sam_sharpness(model, loss, batches),
        "average": average_sharpness(model, loss, batches, num_samples=2),
        "trace": hessian_trace(model, loss, batches, 2),
        "top": top_hessian_eigenvalue(model, loss, batches),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_values_are_those_of_the_trainers_loss_on_its_first_batches(smoothing, tmp_path):
    model, images = toys.vit(dropout=0.3), toys.images(24)
    trainer = toys.trainer(tmp_path, model, images, per_device_eval_batch_size=5, label_smoothing_factor=smoothing,
                           train_sampling_strategy="random")  # fmt: skip
    batches = [batch_of(images[:5]), batch_of(images[5:10])]

    def loss(model, batch):
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], label_smoothing=smoothing)

    found = trainer.sharpness(batches=2, **FEW)
    assert list(found) == list(QUANTITIES)
    for name, estimate in expected(model, batches, loss).items():
        assert found[name].value == pytest.approx(estimate.value, rel=1e-4), name
        assert found[name].standard_error == pytest.approx(estimate.standard_error, rel=1e-2, abs=1e-3), name
    assert as_logs(found).keys() == {"sharpness_sam", *(f"sharpness_{name}{end}" for name in ("average", "trace", "top")
                                                        for end in ("", "_error"))}  # fmt: skip


def test_which_dataset(tmp_path):
    train, evaluation = toys.images(24)[:12], toys.images(24)[12:]

    def sam(dataset=None, data=train, eval_dataset=evaluation):
        trainer = toys.trainer(tmp_path, data=data, eval_dataset=eval_dataset)
        trainer.train_dataset = data or None
        return trainer.sharpness(quantities=("sam",), dataset=dataset)["sam"]

    assert sam() == sam(train, evaluation) != sam(evaluation)
    assert sam(data=[]) == sam(evaluation) == sam("b", eval_dataset={"b": evaluation})
    with pytest.raises(ValueError, match=r"dataset: there is none, or several\. Give the one to measure on"):
        sam(data=[], eval_dataset={"a": train, "b": evaluation})


class Augmented(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        noise = torch.randn(3, 8, 8) + np.random.rand()
        return {**self.images[i], "pixel_values": self.images[i]["pixel_values"] + noise}


def test_augmented_batches_are_the_same_at_every_call(tmp_path):
    trainer = toys.trainer(tmp_path, data=Augmented(toys.images()))
    first = trainer.sharpness(**CHEAP)
    state = torch.get_rng_state()
    torch.randn(5)
    before = torch.get_rng_state()
    assert trainer.sharpness(**CHEAP) == first
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(before, state)


def path_of(tmp_path, callback=None, **flags):
    recorder = toys.PathRecorder()
    settings = {"train_sampling_strategy": "random", "gr_warmup": "none", "gr_r": 0.05, "max_steps": 4, **flags}
    trainer = toys.trainer(tmp_path, toys.vit(dropout=0.3), Augmented(toys.images()), eval_dataset=toys.images(6),
                           callbacks=[recorder], **settings)  # fmt: skip
    if callback is not None:
        trainer.add_callback(SharpnessCallback(trainer, batches=2, **callback))
    trainer.train()
    return recorder.path, trainer.state.log_history


@pytest.mark.parametrize(
    ("every", "flags"),
    [
        (2, {"gradient_accumulation_steps": 2}),
        (1, {"ire_kappa": 1.0, "ire_start_step": 0, "ire_interval": 1}),
        (None, {"eval_strategy": "steps", "eval_steps": 2}),
        (2, {"bf16": True, "logging_steps": 3}),
    ],
)
def test_a_run_is_not_affected(every, flags, tmp_path):
    plain, plain_log = path_of(tmp_path, **flags)
    watched, log = path_of(tmp_path, {"every": every, **FEW, "quantities": ("sam", "average", "trace")}, **flags)
    assert len(plain) == 5 and all(map(torch.equal, plain, watched))
    logged = [entry for entry in log if "sharpness_sam" in entry]
    assert [entry["step"] for entry in logged] == ([1, 2, 3, 4] if every == 1 else [2, 4])
    assert all(entry["sharpness_trace_error"] > 0 for entry in logged) and logged[0] != logged[1]
    timed = ("runtime", "per_second", "seconds")

    def untimed(entries):
        return [{k: v for k, v in e.items() if not k.endswith(timed)} for e in entries if "sharpness_sam" not in e]

    assert untimed(log) == untimed(plain_log)


def test_measured_in_float32_even_if_trained_in_bfloat16(tmp_path):
    trainer = run(toys.vit(), toys.images(), tmp_path, bf16=True, max_steps=1)
    found = trainer.sharpness(**CHEAP)
    model = copy.deepcopy(toys.vit())
    model.load_state_dict(trainer.model.state_dict())
    assert found == toys.trainer(tmp_path, model).sharpness(**CHEAP)
    with torch.no_grad():  # and training goes on as it was
        assert trainer.model(**batch_of(toys.images(2))).logits.abs().max() < 100
        assert "forward" in vars(trainer.model)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def test_central_differences_where_there_is_no_second_derivative(tmp_path):
    exact = toys.trainer(tmp_path).sharpness(2, ("trace", "top"), trace={"num_samples": 2})
    model = toys.vit()
    model.vit.layernorm.register_forward_hook(lambda module, inputs, output: Once.apply(output))
    trainer = toys.trainer(tmp_path, model)
    with pytest.warns(UserWarning, match="Central differences are used: method='exact'") as warned:
        found = trainer.sharpness(2, ("trace", "top"), trace={"num_samples": 2})
    assert len(warned) == 1
    for name, estimate in exact.items():
        assert found[name].value == pytest.approx(estimate.value, rel=2e-3), name
    with_flag = toys.trainer(tmp_path).sharpness(2, ("top",), method="difference")
    assert with_flag["top"].value == pytest.approx(exact["top"].value, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantities": ("sam", "hessian")}, "quantities: 'hessian' is unknown. Choose from sam, average, trace, top"),
        ({"quantities": ("sam",), "trace": {"num_samples": 2}}, "trace=.*'trace' is not among the quantities"),
        ({"batches": 0}, "batches=0: give at least 1"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toys.trainer(tmp_path).sharpness(**arguments)


def test_mistakes_of_the_callback_are_reported_before_training(tmp_path):
    trainer = toys.trainer(tmp_path)
    with pytest.raises(ValueError, match="every=0: give at least 1 step"):
        SharpnessCallback(trainer, every=0)
    with pytest.raises(ValueError, match="quantities: 'tr' is unknown"):
        SharpnessCallback(trainer, quantities=("tr",))
