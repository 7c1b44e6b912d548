"""Pushing to the Hub, by the real client, to a server of our own: what is uploaded, and what happens when it is not."""

from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from helpers import toys
from helpers.hub_server import TOKEN, Hub
from hf_gr import GRConfig, GRTrainer
from hf_gr.cli import script


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # The other protocol for large files is in a binary of its own, with servers of its own.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew, with that address
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts, and ours
    monkeypatch.setenv("HF_TOKEN", "")  # and, at the end, what it was
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


def trained(folder, callbacks=(), **flags) -> GRTrainer:
    settings = {"push_to_hub": True, "hub_token": TOKEN, "gr_warmup": "none", "max_steps": 4, **flags}
    args = GRConfig(**toys.arguments(folder, **settings))
    script.keep_token_out_of_files(args)
    trainer = GRTrainer(toys.vit(), args, train_dataset=toys.images(), callbacks=[*callbacks])
    trainer.train()
    script.save_model(trainer)
    return trainer


@pytest.mark.parametrize("private", [False, True])
def test_everything_is_uploaded_during_and_after_training(hub, private, tmp_path):
    folder = tmp_path / "model"
    trainer = trained(folder, save_strategy="steps", save_steps=2, hub_private_repo=private, hub_always_push=True,
                      report_to="tensorboard")  # fmt: skip
    command = script.command_line("train.py", ["--gr_warmup", "none", "--hub_token", TOKEN], trainer.args)
    script.publish(trainer, "digits", embedded={"digits": "scikit-learn digits"}, tasks="image-classification",
                   command=command)  # fmt: skip
    files = hub.repositories["somebody/model"]
    assert {"model.safetensors", "config.json", "README.md", "curves.png", "training_args.bin"} <= set(files)
    assert not any(name.startswith("checkpoint-") for name in files)
    (events,) = (name for name in files if name.startswith("runs/"))
    for name in ("model.safetensors", "README.md", "curves.png", events):
        assert files[name] == (folder / name).read_bytes()
    assert f"```bash\n{command}\n```" in files["README.md"].decode()
    assert not any(TOKEN.encode() in content for content in files.values())
    assert len(hub.large_objects) >= 2  # the weights and training_args.bin
    card = ModelCard(files["README.md"].decode())
    assert "with gradient regularization" in card.text and "on scikit-learn digits" in card.text
    assert hub.commits[-1] == "End of training" and "Training in progress, step 2" in hub.commits
    assert hub.private["somebody/model"] == private


class SlowUploads(TrainerCallback):
    """Keeps the weights of every checkpoint, and lets nothing be transferred before the last one is there."""

    def __init__(self, hub):
        self.hub, self.weights = hub, {}
        hub.may_transfer.clear()

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.weights[state.global_step] = (checkpoint / "model.safetensors").read_bytes()
        if state.global_step == state.max_steps:
            self.hub.may_transfer.set()


@pytest.mark.parametrize("always", [True, False])
def test_what_training_writes_does_not_break_a_slow_upload(hub, always, tmp_path, caplog):
    """The weights and the log are written again, and the checkpoint is deleted, while they are being uploaded."""
    slow = SlowUploads(hub)
    trained(tmp_path / "model", [slow], save_strategy="steps", save_steps=2, save_total_limit=1,
            report_to="tensorboard", hub_strategy="all_checkpoints", hub_always_push=always)  # fmt: skip
    uploaded = (2, 4) if always else (2,)
    messages = [f"Training in progress, step {step}{of}" for step in uploaded for of in ("", ", checkpoint")]
    assert hub.commits[-len(messages) :] == messages
    for step in uploaded:
        files = hub.versions[f"Training in progress, step {step}, checkpoint"]
        assert files["model.safetensors"] == files[f"checkpoint-{step}/model.safetensors"] == slow.weights[step]
        assert {f"checkpoint-{step}/optimizer.pt", "config.json", "training_args.bin"} <= set(files)
        assert any("tfevents" in name for name in files) and "optimizer.pt" not in files
    assert "failed" not in caplog.text and not list((tmp_path / "model").glob("_*"))


def test_a_name_that_is_there_already_and_ours_is_used(hub, tmp_path):
    hub.repositories["somebody/mine"], hub.private["somebody/mine"] = {"old.txt": b""}, False
    script.publish(trained(tmp_path, hub_model_id="mine"), "digits")
    assert {"old.txt", "model.safetensors"} <= set(hub.repositories["somebody/mine"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hub_token": "hf_may_read"}, "push_to_hub=True: the repository 'model' can be neither found nor created"),
        ({"hub_model_id": "theirs"}, "(?s)push_to_hub=True: the repository 'theirs' .*rights to create a model"),
        ({"hub_token": None}, "(?s)push_to_hub=True: .* Log in with `hf auth login`, or give hub_token"),
    ],
)
def test_without_permission_training_does_not_start(hub, flags, message, tmp_path):
    hub.taken = {"theirs"}
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "model", **flags)
    assert not hub.commits


def test_a_connection_that_breaks_in_training_does_not_stop_it(hub, tmp_path, caplog):
    """The last upload has everything."""
    hub.drop_commits = 99
    trainer = trained(tmp_path / "model", save_strategy="steps", save_steps=4, hub_always_push=True)
    assert trainer.state.global_step == 4
    trainer.push_in_progress.wait_until_done()
    hub.drop_commits = 0
    script.publish(trainer, "digits")
    weights = hub.repositories["somebody/model"]["model.safetensors"]
    assert weights == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert "An upload during training failed" in caplog.text


@pytest.mark.parametrize("what", ["drop_commits", "drop_uploads", "busy"])
def test_a_connection_that_breaks_in_the_last_upload_is_got_over(what, hub, tmp_path):
    trainer = trained(tmp_path / "model")
    setattr(hub, what, 2)
    script.publish(trainer, "digits")
    assert getattr(hub, what) == 0 and "End of training" in hub.commits
    weights = hub.repositories["somebody/model"]["model.safetensors"]
    assert weights == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_results_on_data_of_the_hub_are_uploaded_for_its_leaderboard(hub, tmp_path):
    args = GRConfig(**toys.arguments(tmp_path / "model", push_to_hub=True, hub_token=TOKEN, gr_lambda=0, max_steps=1))
    trainer = GRTrainer(toys.vit(), args, train_dataset=toys.images(), eval_dataset=toys.images(4))
    trainer.train()
    trainer.evaluate()
    script.publish(trainer, "somebody/pixels", tasks="image-classification")
    results = hub.repositories["somebody/model"][".eval_results/hf_gr.yaml"].decode()
    assert "id: somebody/pixels" in results and f"value: {trainer.state.log_history[-1]['eval_loss']}" in results


def test_an_upload_that_fails_for_good_loses_nothing_and_says_what_to_do(hub, tmp_path):
    folder = tmp_path / "model"
    trainer = trained(folder)
    hub.drop_commits = 99
    with pytest.raises(RuntimeError, match=f"failed .* Nothing is lost: .*hf upload somebody/model {folder}"):
        script.publish(trainer, "digits")
    assert {"model.safetensors", "README.md", "curves.png"} <= {path.name for path in folder.iterdir()}
