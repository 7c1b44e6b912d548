"""A run that is stopped and resumed ends with the same bits as one that was not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

import toys
from hf_gr import GRConfig, GRTrainer


def lora():
    model = toys.llama(0.1)
    set_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


class Plain(torch.nn.Module):
    """Not a `PreTrainedModel`: `Trainer` loads it itself, and the names are checked all the same."""

    def __init__(self):
        super().__init__()
        set_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(192, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10))

    def forward(self, pixel_values, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.layers(pixel_values.flatten(1)), labels)}


CASES = {
    "module": (Plain, toys.images),
    "vit": (lambda: toys.vit(0.1), toys.images),
    "swin": (toys.swin, lambda: toys.images(size=16)),
    "llama": (lambda: toys.llama(0.1), toys.text),
    "lora": (lora, toys.text),
}


def trainer(name, output_dir, accumulation=1, **kwargs):
    create, data = CASES[name]
    settings = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "random",
        "warmup_steps": 4,
        "gr_lambda": 0.08,
        **kwargs,
    }
    return GRTrainer(model=create(), args=GRConfig(**toys.arguments(output_dir, **settings)), train_dataset=data())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("warmup", ["zero", "lambda"])
@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_identical(name, warmup, accumulation, tmp_path):
    # T_w = 4: the checkpoint after step 3 lies before the end of the warmup, the one after step 6 behind it.
    whole = trainer(name, tmp_path, accumulation, gr_warmup=warmup)
    whole.train()
    for step in (3, 6):
        resumed = trainer(name, tmp_path, accumulation, gr_warmup=warmup, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(toys.weights(resumed.model), toys.weights(whole.model))
        keys = ("step", "loss", "grad_norm", "gr_lambda", "gr_r", "gr_grad_norm", "gr_perturbed_grad_norm")
        logs = [[{k: e.get(k) for k in keys} for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_loaded(name, tmp_path):
    # The weights right after loading, before any step could hide a difference. Stock Trainer fails this for ViT, Swin.
    whole = trainer(name, tmp_path, max_steps=3, gr_warmup="none")
    whole.train()
    resumed = trainer(name, tmp_path, max_steps=3, gr_warmup="none")
    assert not torch.equal(toys.weights(resumed.model), toys.weights(whole.model))
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert torch.equal(toys.weights(resumed.model), toys.weights(whole.model))


@pytest.fixture
def checkpoint(tmp_path):
    trainer("vit", tmp_path, gr_warmup="none").train()
    return tmp_path / "checkpoint-6"


def rewrite_weights(checkpoint, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def resume(checkpoint):
    resumed = trainer("vit", checkpoint.parent, gr_warmup="none")
    before = toys.weights(resumed.model)
    with pytest.raises(ValueError) as error:
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(toys.weights(resumed.model), before), "a checkpoint that is refused must change nothing"
    return str(error.value)


def test_missing_weights_are_an_error(checkpoint):
    rewrite_weights(checkpoint, lambda weights: weights.pop("vit.layernorm.weight"))
    assert "do not fit the model: 1 (vit.layernorm.weight) missing, none unexpected" in resume(checkpoint)


def test_unexpected_weights_are_an_error(checkpoint):
    rewrite_weights(checkpoint, lambda weights: weights.update(extra=torch.ones(1)))
    assert "none missing, 1 (extra) unexpected" in resume(checkpoint)


def test_missing_weights_of_a_plain_module_are_an_error(tmp_path):
    trainer("module", tmp_path, gr_warmup="none").train()
    rewrite_weights(tmp_path / "checkpoint-6", lambda weights: weights.pop("layers.2.bias"))
    with pytest.raises(ValueError, match=r"do not fit the model: 1 \(layers\.2\.bias\) missing"):
        trainer("module", tmp_path, gr_warmup="none").train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt"])
def test_a_truncated_file_is_named_before_anything_is_loaded(name, checkpoint):
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: len(whole) // 2])
    message = resume(checkpoint)
    assert f"{name} cannot be read" in message and "beside it: checkpoint-3" in message


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_missing_file_is_named(name, checkpoint):
    (checkpoint / name).unlink()
    assert f"{name} is missing" in resume(checkpoint)


def test_a_folder_that_does_not_exist(checkpoint):
    shutil.rmtree(checkpoint)
    assert "there is no such folder" in resume(checkpoint)


def test_adapter_of_another_shape_is_an_error(tmp_path):
    trainer("lora", tmp_path, gr_warmup="none").train()
    resumed = trainer("lora", tmp_path, gr_warmup="none")
    resumed.model = get_peft_model(toys.llama(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r"4 \(.*k_proj.*\) missing, none unexpected"):
        resumed._load_from_checkpoint(str(tmp_path / "checkpoint-6"))


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    trainer("llama", tmp_path, max_steps=6, gr_warmup="none").train()
    resumed = trainer("llama", tmp_path, gr_warmup="none")
    resumed.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    assert resumed.state.global_step == 8
