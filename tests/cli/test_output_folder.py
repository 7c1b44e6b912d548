"""An output folder belongs to one run."""

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest

from helpers import ROOT, toys
from hf_gr import GRConfig
from hf_gr.cli.output_folder import LOCK, claim_output_folder, clear, refuse_removing
from hf_gr.reporting.record import read_record

SCRIPT = ROOT / "scripts" / "train_vit.py"


def arguments(folder, **flags):
    return GRConfig(**toys.arguments(folder, **flags))


#: Another run, as far as the lock goes.
OTHER = """
import json, os, socket, sys
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/_lock")
lock.acquire()
with open(sys.argv[1] + "/_lock.json", "w") as file:
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": "yesterday"}, file)
print("held", flush=True)
sys.stdin.read()
"""


def refusal(folder):
    with pytest.raises(ValueError, match="another run is using this folder") as error:
        claim_output_folder(arguments(folder)).__enter__()
    return str(error.value)


def test_a_run_holds_its_folder_until_it_is_killed(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert f"output_dir={tmp_path}: " in refusal(tmp_path)
        assert f"(process {other.pid} on {socket.gethostname()}, since yesterday)" in refusal(tmp_path)
        other.kill()
    with claim_output_folder(arguments(tmp_path)):
        assert f"(process {os.getpid()} on {socket.gethostname()}, since 2" in refusal(tmp_path)
    with claim_output_folder(arguments(tmp_path)):
        pass


@pytest.mark.parametrize("error", [NotImplementedError, OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_named(error, tmp_path, monkeypatch, caplog):
    def acquire(self, **_):
        raise error

    monkeypatch.setattr("hf_gr.cli.output_folder.FileLock.acquire", acquire)
    with claim_output_folder(arguments(tmp_path)):
        assert "cannot be locked (" in caplog.text


@pytest.mark.parametrize("left", ["model.safetensors", "adapter_model.safetensors", "run.json", "checkpoint-4/any"])
@pytest.mark.parametrize("resume", [None, "last", "elsewhere/checkpoint-4"])
def test_results_of_another_run_are_refused(left, resume, tmp_path):
    path = tmp_path / left
    path.parent.mkdir(exist_ok=True)
    path.touch()
    args = arguments(tmp_path, resume_from_checkpoint=resume)
    if resume == "last" and left.startswith("checkpoint"):
        with claim_output_folder(args):
            return
    with pytest.raises(ValueError, match=r"the folder contains the results of another run .* --overwrite_output_dir"):
        claim_output_folder(args).__enter__()
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-4")
    with claim_output_folder(args):
        pass
    with pytest.raises(ValueError, match=r"would remove the checkpoints that resume_from_checkpoint=.* needs"):
        claim_output_folder(args, overwrite=True).__enter__()


def test_what_is_removed_is_of_a_run(tmp_path, caplog):
    for name in ("checkpoint-4/x", "model.safetensors", "eval_results.json", "README.md", "_superseded/1/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    kept = {"log.txt", "settings.json", "checkpoint-best.txt", "data", LOCK}
    for name in kept:
        (tmp_path / name).touch()
    for source in (tmp_path, tmp_path / "checkpoint-4", tmp_path / "checkpoint-4" / "x"):
        with pytest.raises(ValueError, match=r"this would remove .*, from which this run starts"):
            refuse_removing(tmp_path, [str(source)])
    refuse_removing(tmp_path, ["digits", str(tmp_path / "data"), ""])
    clear(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept
    assert "removed from" in caplog.text and "checkpoint-4, eval_results.json, model.safetensors" in caplog.text


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train_vit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_vit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main


def test_a_script_keeps_one_run_to_a_folder(main, tmp_path):
    flags = ["--max_train_samples", "64", "--max_eval_samples", "8", "--per_device_train_batch_size", "8"]
    flags += ["--model", "vit-micro", "--report_to", "none", "--gr_warmup", "none", "--use_cpu"]
    flags += ["--dataloader_pin_memory", "False", "--output_dir", str(tmp_path)]

    def run(*more):
        main([*flags, "--save_strategy", "steps", "--save_steps", "1", *more])

    run("--max_steps", "2")
    (tmp_path / "note.txt").touch()
    with pytest.raises(
        ValueError, match=r"the results of another run \(checkpoint-1, checkpoint-2, .*overwrite_output"
    ):
        run("--max_steps", "1")
    with pytest.raises(
        ValueError, match=r"has train_examples=64, this one train_examples=32\. Resume with the same data"
    ):
        run("--max_train_samples", "32", "--max_steps", "3", "--resume_from_checkpoint", "last")
    run("--max_steps", "3", "--resume_from_checkpoint", "True")
    assert [s.first_step for s in read_record(tmp_path).segments] == [1, 3]
    run("--max_steps", "1", "--overwrite_output_dir")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1
    assert (tmp_path / "note.txt").exists() and read_record(tmp_path).data["dataset_name"] == "digits"
