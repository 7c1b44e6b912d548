"""Training on a `PackedStream`: each process reads a share of its own, and a checkpoint contains how far it got."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.data_loader import prepare_data_loader
from accelerate.logging import get_logger
from torch.utils.data import DataLoader

from ..data.streams import POSITION, PackedStream, Position
from ..trainer.part import Host, Part

logger = get_logger(__name__)


class StreamPosition(Part):
    """The place of this process's readers in a stream, as of the batches that were trained on."""

    def __init__(self, trainer: Host):
        super().__init__(trainer)
        self._stream: PackedStream | None = None
        self._positions: dict[int, Position] = {}

    def loader(self, stream: PackedStream) -> DataLoader:
        """The share of this process in batches, on its device."""
        args, accelerator = self._trainer.args, self._trainer.accelerator
        self._positions, self._stream = {}, stream.dealt(args.process_index, args.world_size)
        readers, shards = self._readers, stream.documents.num_shards
        if shards < readers:
            logger.warning(
                f"shards (files) of the data: {shards}, readers (processes times dataloader_num_workers): {readers}. "
                "Several read the same shard, and each tokenizes other documents of it. Split the data into at least "
                f"{readers} files, so that each is read once."
            )
        loader: DataLoader = DataLoader(
            self._stream,
            batch_size=args.train_batch_size,
            collate_fn=partial(_collated, self._trainer.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # For one process: accelerate would otherwise let the first one read for all.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    @property
    def _readers(self) -> int:
        args = self._trainer.args
        return args.world_size * max(1, args.dataloader_num_workers)

    def see(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take the position out of a batch that is about to be trained on."""
        if POSITION in batch:
            reader, position = batch.pop(POSITION)
            self._positions[reader] = Position(*position)
        return batch

    @property
    def _identity(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same."""
        stream = self._stream
        assert stream is not None
        return {
            "processes times dataloader_num_workers": self._readers,
            "shards": stream.documents.num_shards,
            "seed": stream.seed,
            "block_size": stream.block_size,
            "window": stream.window,
        }

    def save(self, folder: str) -> None:
        if self._stream is not None:
            file = self._file(folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"stream": self._identity, "positions": self._positions}), encoding="utf-8")

    def load(self, folder: str) -> None:
        """Raises `ValueError` if the checkpoint has no position, or one in another stream."""
        args = self._trainer.args
        if self._stream is None or args.ignore_data_skip:
            return
        file, remedy = self._file(folder), "or set ignore_data_skip=True to read the data from its beginning"
        if not file.is_file():
            raise ValueError(
                f"resume_from_checkpoint={folder}: it has no {file.name}, the place in the stream. Resume with the "
                f"number of processes and the version of hf_gr that wrote it, {remedy}."
            )
        saved = json.loads(file.read_text(encoding="utf-8"))
        if changed := [key for key, value in self._identity.items() if saved["stream"][key] != value]:
            there, here = (
                ", ".join(f"{key}={side[key]}" for key in changed) for side in (saved["stream"], self._identity)
            )
            raise ValueError(
                f"resume_from_checkpoint={folder}: the place in its stream is for {there}, but this run has {here}. "
                f"Resume with the same, {remedy}."
            )
        self._positions = {int(reader): Position(*place) for reader, place in saved["positions"].items()}
        steps = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        batches = steps * args.gradient_accumulation_steps
        self._stream.resume(dict(self._positions), batches, args.train_batch_size)

    def _file(self, folder: str) -> Path:
        return Path(folder, f"stream_{self._trainer.args.process_index}.json")


def _collated(collator: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch, with the position after its last example; nothing of the empty examples of a resumed stream."""
    position = [example.pop(POSITION) for example in examples if example][-1:]
    return {**collator(examples), POSITION: position[0]} if position else {}
