"""Training on a stream: it resumes in the middle, bit for bit, without reading what comes before."""

import json
import logging
import shutil

import pytest
import torch

from helpers.streams import numbers, train
from helpers.toys import weights
from hf_gr.data import streams

IRE = {"ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 1}


@pytest.fixture(scope="module", autouse=True)
def few_documents_are_tokenized_together():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BATCH", 2)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps of four documents, with IRE, dropout and a checkpoint after three."""
    folder = tmp_path_factory.mktemp("stream")
    return train(str(folder), **IRE), folder


def test_every_document_is_trained_on_once(whole):
    trainer, _ = whole
    documents = [number for step in trainer.documents for number in step]
    assert len(documents) == 24 == len(set(documents)) and documents != sorted(documents)


def test_resumed_run_continues_with_the_next_document(whole, tmp_path):
    trainer, folder = whole
    data = numbers()
    resumed = train(str(tmp_path), str(folder / "checkpoint-3"), data, save_strategy="no", **IRE)
    assert resumed.documents == trainer.documents[3:]
    assert torch.equal(weights(resumed.model), weights(trainer.model))
    logs = [
        [(e["step"], e["loss"], e["epoch"]) for e in t.state.log_history if "loss" in e] for t in (trainer, resumed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    # Of the 12 documents before, only those of the last window are read again, and the one at whose end it begins.
    before = {number for step in trainer.documents[:3] for number in step}
    assert len(before) == 12 and len(before & set(data.tokenizer.seen)) <= 5
    assert len(data.tokenizer.seen) < len(trainer.train_dataset.tokenizer.seen)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_read_ahead_do_not_move_the_position(workers, tmp_path):
    flags = {"dataloader_num_workers": workers, "max_steps": 4, "save_steps": 2}
    trainer = train(str(tmp_path / "whole"), **flags)
    resumed = train(str(tmp_path / "rest"), str(tmp_path / "whole" / "checkpoint-2"), **flags)
    documents = [number for step in trainer.documents for number in step]
    assert len(documents) == 16 == len(set(documents))
    assert resumed.documents == trainer.documents[2:]
    assert torch.equal(weights(resumed.model), weights(trainer.model))


def test_a_position_in_another_stream_is_refused(whole, tmp_path):
    _, folder = whole
    checkpoint = str(folder / "checkpoint-3")
    cases = [
        (
            {"data": numbers(shards=4)},
            r"the place in its stream is for shards=5, but this run has shards=4\. Resume with",
        ),
        ({"dataloader_num_workers": 2}, "is for processes times dataloader_num_workers=1, but this run has .*=2"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            train(str(tmp_path), checkpoint, **IRE, **changes)
    bare = shutil.copytree(checkpoint, tmp_path / "bare" / "checkpoint-3")
    (bare / "stream_0.json").unlink()
    with pytest.raises(ValueError, match=r"it has no stream_0\.json.*ignore_data_skip=True"):
        train(str(tmp_path), str(bare), **IRE)
    again = train(str(tmp_path), str(bare), ignore_data_skip=True, **IRE)
    assert again.documents[0] == whole[0].documents[0]


def test_fewer_shards_than_readers_are_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = train(str(tmp_path), data=numbers(shards=1), max_steps=2, dataloader_num_workers=2, save_steps=2)
    assert "shards (files) of the data: 1, readers (processes times dataloader_num_workers): 2." in caplog.text
    documents = trainer.documents[0] + trainer.documents[1]
    assert len(set(documents)) == 8 and {number % 2 for number in documents} == {0, 1}
    saved = json.loads((tmp_path / "checkpoint-2" / "stream_0.json").read_text())
    assert set(saved["positions"]) == {"0", "1"}
