"""Streams: every document dealt to one reader, and resumed at any block without reading what comes before."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_gr.data import streams
from hf_gr.data.streams import POSITION, DocumentStream, PackedStream, Position
from hf_gr.data.text import train_tokenizer


def text(i: int) -> str:
    return f"document {i}: " + "some words, " * (i % 7)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text(i) for i in range(50)], 300, 64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five files of different sizes, 115 documents, one of them blank."""
    folder = tmp_path_factory.mktemp("corpus")
    bounds = np.cumsum([0, 40, 10, 23, 1, 41])
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        texts = ["" if k == 60 else text(k) for k in range(first, last)]
        Dataset.from_dict({"text": texts, "other": range(first, last)}).to_parquet(folder / f"{i}.parquet")
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), streaming=True, split="train")


@pytest.fixture
def stream(corpus, tokenizer):
    return PackedStream(DocumentStream(corpus, "text"), tokenizer, block_size=8, seed=3, window=4)


class Counting:
    """A tokenizer that counts the documents it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id, self.seen = tokenizer, tokenizer.eos_token_id, Counter()

    def __call__(self, texts, **kwargs):
        self.seen.update(texts)
        return self.tokenizer(texts, **kwargs)


# ---- Every document once ----


@pytest.mark.parametrize("readers", [1, 2, 3, 5, 8, 11])
def test_every_document_is_dealt_to_one_reader_in_each_epoch(readers, stream):
    """Also with more readers than shards: those that share one take different documents of it."""
    expected = Counter(i for i in range(115) if i != 60)
    for epoch in (0, 1):
        seen = Counter()
        for reader in range(readers):
            for place, ids in stream._sequence(reader, readers, Position(epoch)):
                if place.epoch > epoch:
                    break
                seen[int(stream.tokenizer.decode(ids).split(":")[0].split()[1])] += 1
        assert seen == expected


def test_shards_are_dealt_anew_in_each_epoch(stream):
    def documents_of_first_shard(epoch, reader):
        places = (place for place, _ in stream._sequence(reader, 2, Position(epoch)))
        return sum(1 for _ in itertools.takewhile(lambda place: place[:2] == (epoch, 0), places))

    assert len({tuple(documents_of_first_shard(epoch, reader) for reader in (0, 1)) for epoch in range(5)}) > 2


def test_no_token_is_lost_between_documents_shards_and_epochs(stream):
    sequence = stream._sequence(0, 2, Position())
    expected = np.concatenate([ids for _, ids in itertools.islice(sequence, 200)])
    windows = [w for _, w in itertools.islice(stream._windows(0, 2, Position()), len(expected) // 32)]
    found = np.concatenate(windows).reshape(-1)
    assert np.array_equal(found, expected[: len(found)])


def test_a_window_is_shuffled_and_complete(stream):
    _, window = next(stream._windows(1, 2, Position()))
    shuffled = [block for _, block in itertools.islice(stream._blocks(1, 2, Position()), 4)]
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, window))
    starts = [tuple(next(stream._blocks(reader, 2, Position()))[1]) for reader in (0, 1)]
    assert starts[0] != starts[1]
    orders = {
        tuple(int(np.flatnonzero((w == b).all(1))[0]) for _, b in itertools.islice(stream._blocks(0, 1, begin), 4))
        for begin, w in itertools.islice(stream._windows(0, 1, Position()), 12)
    }
    assert len(orders) > 5


# ---- Resuming ----


@pytest.mark.parametrize("readers", [1, 2, 8])
def test_every_position_continues_with_the_next_block(readers, stream):
    whole = list(itertools.islice(stream._blocks(0, readers, Position()), 120))
    assert whole[-1][0].epoch >= 1 if readers == 8 else whole[-1][0].part >= 1
    for i in (0, 1, 3, 4, 17, 62, 100):
        position = Position(*whole[i][0])
        rest = itertools.islice(stream._blocks(0, readers, position), 119 - i)
        for (place, block), (same_place, same) in zip(whole[i + 1 :], rest, strict=True):
            assert place == same_place and np.array_equal(block, same)


def test_resuming_does_not_read_what_comes_before(corpus, tokenizer, monkeypatch):
    """A window of 32 tokens has at most 5 documents, and 4 are tokenized together."""
    monkeypatch.setattr(streams, "BATCH", 4)
    counting = Counting(tokenizer)
    stream = PackedStream(DocumentStream(corpus, "text"), counting, block_size=8, seed=3, window=4)
    blocks = stream._blocks(0, 1, Position())
    position = next(position for position, _ in blocks if position.part > 0 and position.row >= 8)
    assert sum(counting.seen.values()) >= 20
    place, following = next(blocks)
    counting.seen.clear()
    opened, read = [], DocumentStream.read

    def watched(self, shard, row=0):
        opened.append(row)
        return read(self, shard, row)

    monkeypatch.setattr(DocumentStream, "read", watched)
    same_place, same = next(stream._blocks(0, 1, position))
    assert place == same_place and np.array_equal(following, same)
    assert opened[0] == position.row and len(opened) <= 2
    assert sum(counting.seen.values()) <= 12


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_after_the_batches_it_has_given(workers, stream):
    """Whatever its workers have read ahead. First come as many empty batches as were given, for `Trainer` to skip."""

    def collate(examples):
        positions = [example.pop(POSITION) for example in examples if example]
        return {**default_data_collator(examples), POSITION: positions[-1]} if positions else {}

    def batches(dataset, count):
        return list(itertools.islice(DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate), count))

    whole = batches(stream.dealt(1, 2), 12)
    assert {batch[POSITION][0] for batch in whole} == ({1} if workers == 0 else {2, 3})
    for given in (5, 8):
        resumed = stream.dealt(1, 2)
        resumed.resume({batch[POSITION][0]: batch[POSITION][1] for batch in whole[:given]}, given, 3)
        again = batches(resumed, 12)
        assert again[:given] == [{}] * given
        for one, other in zip(whole[given:], again[given:], strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"]) and one[POSITION] == other[POSITION]
    assert not stream._is_dealt and POSITION not in next(iter(copy.copy(stream)))


# ---- Evaluation ----


def test_held_out_documents_are_never_trained_on(corpus, tokenizer):
    train, evaluation = DocumentStream(corpus, "text", first=3), DocumentStream(corpus, "text", stop=3)
    counting = Counting(tokenizer)
    stream = PackedStream(train, counting, 8)
    list(itertools.islice(stream._sequence(0, 1, Position()), 300))
    held_out = set(evaluation)
    assert len(held_out) == 4 * 3 + 1
    assert held_out.isdisjoint(counting.seen) and len(set(counting.seen) | held_out) == 114
