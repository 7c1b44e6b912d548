"""A run that is stopped and resumed ends with the same bits as one that was not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from helpers import toys
from hf_gr import GRConfig
from hf_gr.cli import script
from hf_gr.trainer import checkpoints


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


def adapters(*names):
    """Named adapters, all of them trained."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "init_lora_weights": False}
    model = get_peft_model(toys.llama(0.1), LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**settings))
    model.base_model.set_adapter([*names])
    return model


CASES = {
    "named adapter": (lambda: adapters("x"), toys.text),
    "two adapters": (lambda: adapters("default", "x"), toys.text),
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
    return toys.trainer(output_dir, create(), data(), **settings)


WHOLE_MODELS = ("module", "vit", "swin", "llama", "lora")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("warmup", ["zero", "lambda"])
@pytest.mark.parametrize("name", WHOLE_MODELS)
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


@pytest.mark.parametrize("name", ["named adapter", "two adapters"])
def test_adapters_resume_bit_identically(name, tmp_path):
    whole = trainer(name, tmp_path)
    whole.train()
    resumed = trainer(name, tmp_path, save_strategy="no")
    trained = [n for n, p in resumed.model.named_parameters() if p.requires_grad]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert torch.equal(toys.weights(resumed.model), toys.weights(whole.model))
    assert [n for n, p in resumed.model.named_parameters() if p.requires_grad] == trained
    # The best model is loaded alike.
    resumed.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    resumed._load_best_model()
    assert not torch.equal(toys.weights(resumed.model), toys.weights(whole.model))
    (tmp_path / "checkpoint-6" / "x" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


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


# ---- Another number of processes ----


def written_by(processes, checkpoint):
    """Make of a checkpoint what several processes would have written: it differs in the random states alone."""
    state = checkpoint / "rng_state.pth"
    for rank in range(processes):
        shutil.copy(state, checkpoint / f"rng_state_{rank}.pth")
    state.unlink()


@pytest.mark.parametrize("given", ["last", True])
def test_a_checkpoint_of_another_number_of_processes_is_resumed(given, checkpoint, caplog):
    for step in (3, 6, 8):
        written_by(2, checkpoint.parent / f"checkpoint-{step}")
    shutil.rmtree(checkpoint.parent / "checkpoint-8")
    recorder = toys.PathRecorder()
    resumed = trainer("vit", checkpoint.parent, gr_warmup="none", resume_from_checkpoint=given)
    resumed.add_callback(recorder)
    resumed.train(resume_from_checkpoint=script.checkpoint_to_resume(resumed.args))
    whole = trainer("vit", checkpoint.parent)
    whole._load_from_checkpoint(str(checkpoint))
    assert torch.equal(recorder.path[0], toys.weights(whole.model))
    assert resumed.state.global_step == 8 and len(recorder.path) == 3
    assert caplog.text.count("a run of 2 processes, this one has 1: ") == 1
    assert "not bitwise the one that was interrupted" in caplog.text


@pytest.mark.parametrize(("written", "resumed", "warns"), [(1, 2, True), (2, 3, True), (3, 2, True), (2, 2, False)])
def test_random_states_that_differ_are_named(written, resumed, warns, tmp_path, caplog):
    names = ["rng_state.pth"] if written == 1 else [f"rng_state_{rank}.pth" for rank in range(written)]
    for name in names:
        (tmp_path / name).touch()
    checkpoints.warn_of_other_processes(str(tmp_path), resumed)
    assert (f"this one has {resumed}" in caplog.text) == warns


def test_last_never_starts_from_the_beginning_where_there_are_checkpoints(checkpoint):
    args = GRConfig(output_dir=str(checkpoint.parent), use_cpu=True, resume_from_checkpoint="last")
    for step in (3, 6, 8):
        (checkpoint.parent / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"=last: no checkpoint in .* \(checkpoint-3, checkpoint-6, checkpoint-8\) is c"
    ):
        script.checkpoint_to_resume(args)
    args.output_dir += "/empty"
    assert script.checkpoint_to_resume(args) is None


def test_a_run_that_goes_back_keeps_the_later_checkpoints(checkpoint, caplog):
    """`save_total_limit` would delete them, or with equal times of files those of the run itself."""
    folder, weights = checkpoint.parent, (checkpoint / "model.safetensors").read_bytes()
    flags = {"gr_warmup": "none", "save_total_limit": 1, "max_steps": 5}
    resumed = trainer("vit", folder, **flags)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert [p.name for p in checkpoints.checkpoints(folder)] == ["checkpoint-5"]
    aside = folder / "_superseded" / "1"
    assert [p.name for p in checkpoints.checkpoints(aside)] == ["checkpoint-6", "checkpoint-8"]
    assert (aside / "checkpoint-6" / "model.safetensors").read_bytes() == weights
    assert "checkpoint-6, checkpoint-8, are not part of this run and were moved to" in caplog.text
    trainer("vit", folder, **flags).train()
    assert "the checkpoints of an earlier run, checkpoint-5, are where this run writes" in caplog.text


# ---- Another run ----


def resumed_llama(folder, **flags):
    """Resumed from the checkpoint that `llama_checkpoint` has made, with other flags."""
    data = toys.text(flags.pop("examples", 24))
    args = {"max_steps": 6, "save_strategy": "no", "gr_warmup": "none", "optim": "sgd", **flags}
    resumed = toys.trainer(folder, toys.llama(), data, **args)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    return resumed


@pytest.fixture(scope="module")
def llama_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "gr_warmup": "none", "optim": "sgd"}
    toys.trainer(folder, toys.llama(), toys.text(), **flags).train()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gr_lambda": 0}, "has gr=True, this one gr=False. Resume with the same method"),
        ({"ire_kappa": 1.0, "ire_start_step": 0}, "has ire=False, this one ire=True"),
        ({"optim": "adamw_torch"}, "has optimizer=SGD, this one optimizer=AdamW"),
        ({"examples": 12}, "has train_examples=24, this one train_examples=12. Resume with the same data"),
    ],
    ids=["gr", "ire", "optimizer", "data"],
)
def test_another_method_and_other_data_are_refused(flags, message, llama_checkpoint):
    with pytest.raises(ValueError, match=f"resume_from_checkpoint=.*: the run that wrote it {message}"):
        resumed_llama(llama_checkpoint, **flags)


def test_other_arguments_are_named_with_the_value_in_force(llama_checkpoint, caplog):
    flags = {"learning_rate": 5.0, "gr_r": 0.2, "lr_scheduler_type": "cosine", "weight_decay": 0.5}
    resumed = resumed_llama(llama_checkpoint, **flags)
    (warning,) = [r.getMessage() for r in caplog.records if "Differs from the run that wrote" in r.getMessage()]
    for part in (
        "checkpoint-4: ",
        "learning_rate=5.0 has no effect, the checkpoint's 0.01 is in force",
        "weight_decay=0.5 has no effect, the checkpoint's 0 is in force",
        "gr_r=0.2 is in force, it was 0.1",
        "lr_scheduler_type=cosine is in force, it was default",
    ):
        assert part in warning
    assert resumed.optimizer.param_groups[0]["initial_lr"] == 0.01
    caplog.clear()
    resumed_llama(llama_checkpoint, max_steps=5)
    assert "learning_rate" not in caplog.text and "gr_r" not in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop", "lars"])
def test_the_state_of_another_optimizer_is_refused_without_a_record(optim, llama_checkpoint, tmp_path):
    """As of a checkpoint of `Trainer`. It was a `KeyError` in the first step."""
    shutil.copytree(llama_checkpoint / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"optimizer state in the checkpoint is not that of \w+: it lacks .*"):
        resumed_llama(tmp_path, optim=optim)
