"""Uploads during training (`push_to_hub`), each from a snapshot of its files.

`Trainer` uploads the output folder in the background while training keeps writing to it. A file that changes between
hashing and transfer (TensorBoard's log, or the weights with `hub_always_push`) or is gone by then (a checkpoint, with
`save_total_limit`) fails the whole upload; and a queued upload sends the weights of a later step under the message of
an earlier one.
"""

import logging
import os
import shutil
import tempfile
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from .part import Host, Part

logger = logging.getLogger(__name__)

#: The files of a checkpoint that belong to the model; the rest is for resuming.
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*.bin*", "adapter_*")
#: Entries of the output folder that are not uploaded.
LEFT_OUT = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")
SNAPSHOT = "_upload-"


class Uploads(Part):
    """The uploads of `hub_strategy`. Training never waits for them, and they contain the files as they were when the
    checkpoint was written. Weights take no extra space: in a snapshot, they are hard links to the checkpoint's."""

    def __init__(self, trainer: Host):
        super().__init__(trainer)
        self._api = HfApi()

    def push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As `Trainer._push_from_checkpoint`, except that nothing is copied into the output folder."""
        args = self._trainer.args
        is_pushing = self._trainer.push_in_progress is not None and not self._trainer.push_in_progress.is_done()
        if (
            not self._trainer.is_world_process_zero()
            or args.hub_strategy == HubStrategy.END
            or (is_pushing and not args.hub_always_push)
        ):
            return
        self._trainer.callback_handler.on_push_begin(args, self._trainer.state, self._trainer.control)
        checkpoint = Path(checkpoint_folder)
        when = f"epoch {int(self._trainer.state.epoch)}"
        if args.save_strategy == SaveStrategy.STEPS:
            when = f"step {self._trainer.state.global_step}"
        message = f"Training in progress, {when}"
        if not is_pushing:
            self._trainer.push_in_progress = PushInProgress()
            for left_by_a_killed_run in Path(args.output_dir).glob(f"{SNAPSHOT}*"):
                shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
        jobs = self._trainer.push_in_progress.jobs
        jobs.append(self._upload_in_background(self._model_snapshot(checkpoint), message))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            snapshot = self._new_snapshot()
            shutil.copytree(checkpoint, snapshot, copy_function=link_or_copy, dirs_exist_ok=True)
            jobs.append(self._upload_in_background(snapshot, f"{message}, checkpoint", name))

    def _new_snapshot(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=SNAPSHOT, dir=self._trainer.args.output_dir))

    def _model_snapshot(self, checkpoint: Path) -> Path:
        """A copy of the output folder, with the model of `checkpoint`."""
        snapshot = self._new_snapshot()
        for path in Path(self._trainer.args.output_dir).iterdir():
            if _is_one_of(path, LEFT_OUT + MODEL_FILES):
                continue
            if path.is_dir():
                shutil.copytree(path, snapshot / path.name)
            else:
                shutil.copy2(path, snapshot)
        for path in checkpoint.iterdir():
            if path.is_file() and _is_one_of(path, MODEL_FILES):
                link_or_copy(path, snapshot / path.name)
        if self._trainer.processing_class is not None:
            self._trainer.processing_class.save_pretrained(snapshot)
        torch.save(self._trainer.args, snapshot / TRAINING_ARGS_NAME)
        return snapshot

    def _upload_in_background(self, snapshot: Path, message: str, path_in_repo: str | None = None) -> Future:
        """Upload `snapshot` after the uploads already queued, and delete it."""
        repo_id = self._trainer.hub_model_id
        assert repo_id is not None

        def upload() -> None:
            try:
                self._api.upload_folder(
                    repo_id=repo_id,
                    folder_path=snapshot,
                    path_in_repo=path_in_repo,
                    commit_message=message,
                    token=self._trainer.args.hub_token,
                    revision=self._trainer.args.hub_revision,
                )
            except Exception as error:
                logger.warning(f"An upload during training failed ({message}: {error}). The last one is complete.")
                raise
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)

        return self._api.run_as_future(upload)


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """For files that are never written again. Not every file system supports hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
