"""Text that is read while it is trained on: documents of a sharded corpus, packed into blocks.

The corpus is read by one reader per process and `DataLoader` worker. Each follows an endless sequence of documents,
epoch after epoch; in every epoch the shards (files) are shuffled and dealt to the readers anew. The tokens of the
sequence are cut into windows of blocks, and the blocks of a window are shuffled. A place in such a sequence is five
numbers, so a run can resume there without reading what comes before.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Documents that are tokenized together.
BATCH = 256
#: Blocks that are shuffled together.
WINDOW = 1000
#: The key of a block's (reader, `Position`) in the examples of a stream that was dealt.
POSITION = "position"


class Position(NamedTuple):
    """A place in the sequence of a reader: after `emitted` blocks of the window that begins at token `token` of row
    `row`, in its part number `part` of the epoch."""

    epoch: int = 0
    part: int = 0
    row: int = 0
    token: int = 0
    emitted: int = 0


@dataclass(frozen=True)
class DocumentStream:
    """The rows `first` to `stop` of each shard of a streamed dataset.

    Attributes:
        dataset: with one shard per file.
        column: the one with the text.
        split: its name in the dataset, for errors.
        skip_bad: whether rows without text are left out, with a warning, or an error.
    """

    dataset: IterableDataset
    column: str
    split: str = "train"
    skip_bad: bool = False
    first: int = 0
    stop: int | None = None

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards

    def read(self, shard: int, row: int = 0) -> Iterator[tuple[int, list[str]]]:
        """The texts of a shard from `row` on, in batches: (row of the first, texts); "" for a row that is left out."""
        row = max(row, self.first)
        rows = self.dataset.select_columns([self.column]).shard(self.num_shards, shard).skip(row)
        for table in rows.with_format("arrow").iter(BATCH):
            texts = table[self.column].to_pylist()
            if self.stop is not None:
                texts = texts[: max(0, self.stop - row)]
            if not texts:
                return
            yield row, [self._checked(text, shard, row + i) for i, text in enumerate(texts)]
            row += len(texts)

    def _checked(self, text: Any, shard: int, row: int) -> str:
        if isinstance(text, str):
            return text
        kind = "null" if text is None else f"a {type(text).__name__}"
        where = f"split {self.split!r}, shard {shard}, row {row}: column {self.column!r} is {kind}"
        if not self.skip_bad:
            raise ValueError(f"{where}. Fix or remove such documents, or leave them out with --skip_bad_examples.")
        logger.warning(f"{where}. It is left out.")
        return ""

    def __iter__(self) -> Iterator[str]:
        """All texts, shard after shard."""
        for shard in range(self.num_shards):
            for _, texts in self.read(shard):
                yield from filter(None, texts)


class PackedStream(TorchIterableDataset):
    """An endless stream of shuffled blocks, each a dict of `input_ids` and `labels`, which are equal.

    Each document is followed by the end-of-text token. No token is lost: a block may contain the end of one shard and
    the beginning of the next, or of the next epoch.

    Args:
        documents: what to read.
        tokenizer: one with an end-of-text token.
        block_size: tokens per block.
        seed: of both shuffles.
        window: blocks that are shuffled together.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        seed: int = 0,
        window: int = WINDOW,
    ):
        self.documents, self.tokenizer = documents, tokenizer
        self.block_size, self.seed, self.window = block_size, seed, window
        self._rank, self._world, self._is_dealt = 0, 1, False
        self._positions: dict[int, Position] = {}
        self._skipped_batches, self._batch_size = 0, 1

    def dealt(self, rank: int, world: int) -> "PackedStream":
        """The same stream as process `rank` of `world` reads it; its examples have their position."""
        stream = copy.copy(self)
        stream._rank, stream._world, stream._is_dealt = rank, world, True
        return stream

    def resume(self, positions: dict[int, Position], skipped_batches: int, batch_size: int) -> None:
        """Continue from the positions of the readers.

        `Trainer` takes the batches that it has trained on out of the loader again. As many empty examples come first,
        for which nothing is read.
        """
        self._positions, self._skipped_batches, self._batch_size = positions, skipped_batches, batch_size

    def take(self, count: int) -> Dataset:
        """The first `count` blocks of all documents, shard after shard, in memory."""
        features = {name: List(Value("int32"), length=self.block_size) for name in ("input_ids", "labels")}
        blocks = np.array(list(islice(self._in_order(), count)), dtype=np.int32).reshape(-1, self.block_size)
        return Dataset.from_dict(dict.fromkeys(features, blocks), Features(features))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The loader takes its batches from the workers in turn.
        yield from repeat({}, len(range(worker, self._skipped_batches, workers)) * self._batch_size)
        reader = self._rank * workers + worker
        start = self._positions.get(reader, Position())
        for position, block in self._blocks(reader, self._world * workers, start):
            ids = torch.from_numpy(block.astype(np.int64))
            yield {"input_ids": ids, "labels": ids} | ({POSITION: (reader, position)} if self._is_dealt else {})

    def _blocks(self, reader: int, readers: int, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """The reader's blocks, each with the position after it."""
        emitted = start.emitted
        for begin, window in self._windows(reader, readers, start._replace(emitted=0)):
            order = np.random.default_rng([self.seed, reader, *begin]).permutation(len(window))
            for i in range(emitted, len(window)):
                yield begin._replace(emitted=i + 1), window[order[i]]
            emitted = 0

    def _windows(self, reader: int, readers: int, begin: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """(where it begins, its blocks in order) of each window."""
        size = self.window * self.block_size
        waiting: list[np.ndarray] = []
        missing, token = size, begin.token
        for place, ids in self._sequence(reader, readers, begin):
            while len(ids) - token >= missing:
                waiting.append(ids[token : token + missing])
                yield begin, np.concatenate(waiting).reshape(self.window, self.block_size)
                token += missing
                begin, waiting, missing = place._replace(token=token), [], size
            waiting.append(ids[token:])
            missing -= len(ids) - token
            token = 0

    def _sequence(self, reader: int, readers: int, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """(where it begins, its tokens) of each document of the reader, from the one at `start` on."""
        # With fewer shards than readers, several read the same one, and each takes every `stride`-th document.
        stride = -(-readers // self.documents.num_shards)
        everything = [(shard, offset) for shard in range(self.documents.num_shards) for offset in range(stride)]
        first, row = start.part, start.row
        for epoch in count(start.epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(everything))[reader::readers]
            for part in range(first, len(order)):
                shard, offset = everything[order[part]]
                for place, ids in self._tokenized(shard, row, stride, offset):
                    yield Position(epoch, part, place), ids
                row = 0
            first = 0

    def _tokenized(self, shard: int, row: int = 0, stride: int = 1, offset: int = 0) -> Iterator[tuple[int, Any]]:
        """(row, array of tokens) of the documents of a shard from `row` on."""
        for first, texts in self.documents.read(shard, row):
            rows = [first + i for i, text in enumerate(texts) if text and (first + i) % stride == offset]
            if not rows:
                continue
            chosen = [texts[row - first] for row in rows]
            ids = self.tokenizer(chosen, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for row, tokens in zip(rows, ids["input_ids"], strict=True):
                yield row, np.array([*tokens, self.tokenizer.eos_token_id], dtype=np.int32)

    def _in_order(self) -> Iterator[np.ndarray]:
        shards = range(self.documents.num_shards)
        return cut((ids for shard in shards for _, ids in self._tokenized(shard)), self.block_size)


def cut(pieces: Iterable[np.ndarray], block_size: int) -> Iterator[np.ndarray]:
    """Cut tokens, in pieces of any length, into blocks; an incomplete last one is dropped."""
    waiting: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count < block_size:
            continue
        joined = np.concatenate(waiting)
        whole = len(joined) // block_size * block_size
        yield from joined[:whole].reshape(-1, block_size)
        waiting, count = [joined[whole:]], len(joined) - whole
