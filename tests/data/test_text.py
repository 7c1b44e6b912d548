"""Text: what is loaded, how it is split, and that packing keeps every token."""

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from hf_gr.data.streams import DocumentStream
from hf_gr.data.text import (
    END_OF_TEXT,
    features_of,
    find_text_column,
    load_text_dataset,
    null_rows,
    pack,
    skipped_metrics,
    split_documents,
    train_tokenizer,
    without_null_documents,
)

DOCUMENTS = [f"document {i}: " + "some words, " * (i % 7) for i in range(50)] + ["", "naïve 日本語 \x00 \n\t end"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300, 64)


def rows(name: str, *values) -> Dataset:
    return Dataset.from_dict({name: list(values)})


# ---- Tokenizer ----


def test_no_text_is_unknown_to_the_tokenizer(tokenizer, tmp_path):
    for text in (*DOCUMENTS, "never seen: ∀ε>0 🙂", "  leading", "trailing  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == END_OF_TEXT
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path)(DOCUMENTS[9])["input_ids"] == tokenizer(DOCUMENTS[9])["input_ids"]


def test_training_a_tokenizer_twice_gives_the_same_one(tokenizer):
    """Each process trains its own."""
    assert train_tokenizer(DOCUMENTS, 300, 64).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_without_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256: a byte-level BPE has at least the 256 bytes"):
        train_tokenizer(DOCUMENTS, 256, 64)


# ---- Packing ----


@pytest.mark.parametrize(("block_size", "num_proc"), [(2, None), (7, None), (64, None), (7, 2)])
def test_packing_loses_no_token_but_the_last_partial_block(tokenizer, block_size, num_proc):
    expected = [t for text in DOCUMENTS if text for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = pack(rows("text", *DOCUMENTS), tokenizer, "text", block_size, num_proc)
    assert all(len(block) == block_size for block in blocks["input_ids"])
    assert [t for block in blocks["input_ids"] for t in block] == expected[: len(blocks) * block_size]
    assert 0 <= len(expected) - len(blocks) * block_size < block_size
    assert blocks["labels"] == blocks["input_ids"]


def test_a_stream_is_packed_alike(tokenizer):
    documents = rows("text", *DOCUMENTS)
    stream = pack(DocumentStream(documents.to_iterable_dataset(num_shards=3), "text"), tokenizer, "text", 16)
    expected = pack(documents, tokenizer, "text", 16)
    taken = stream.take(10_000)
    assert taken.features == expected.features
    assert taken[:] == expected[:]
    assert stream.take(2)[:] == expected[:2]


def test_too_little_text_is_named(tokenizer):
    for documents in (rows("text", "a few", "words"), rows("text", ""), rows("text", "x").select([])):
        with pytest.raises(ValueError, match=r"block_size=50: the \d documents have fewer tokens than that together"):
            pack(documents, tokenizer, "text", 50)
    stream = rows("text", "a few", "words").to_iterable_dataset()
    for first in (0, 9):
        with pytest.raises(ValueError, match="block_size=50: the stream has fewer tokens than that"):
            pack(DocumentStream(stream, "text", first=first), tokenizer, "text", 50)


def test_packing_needs_an_end_of_text(tokenizer):
    import copy

    headless = copy.deepcopy(tokenizer)
    headless.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no end-of-text token"):
        pack(rows("text", "a"), headless, "text", 8)


@pytest.mark.parametrize("block_size", [1, 0, -1])
def test_a_block_has_a_token_and_the_next(tokenizer, block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size}: must be at least 2"):
        pack(rows("text", "a"), tokenizer, "text", block_size)


# ---- Splits ----


def test_evaluation_is_of_whole_documents_that_are_not_in_train():
    documents = [f"unique document {i}" for i in range(200)]
    dataset = DatasetDict({"train": rows("text", *documents)})
    train, evaluation, name = split_documents(dataset, 20, seed=0)
    assert (len(train), len(evaluation), name) == (180, 20, "20 documents of train")
    assert set(train["text"]) | set(evaluation["text"]) == set(documents)
    assert not set(train["text"]) & set(evaluation["text"])
    again = split_documents(dataset, 20, seed=0)[1]
    assert again["text"] == evaluation["text"]
    assert len(split_documents(dataset, None, seed=0)[1]) == 2


def test_a_stream_is_split_at_its_beginning():
    for shards, held_out, expected in (
        (1, [0, 1, 2, 3, 4], "first 5 documents of train"),
        (3, [0, 1, 10, 11, 20, 21], "first 2 documents of each of the 3 shards of train"),
    ):
        documents = rows("text", *map(str, range(30))).to_iterable_dataset(num_shards=shards)
        train, evaluation, name = split_documents({"train": DocumentStream(documents, "text")}, 5, seed=0)
        assert list(evaluation) == [str(i) for i in held_out]
        assert list(train) == [str(i) for i in range(30) if i not in held_out]
        assert name == expected


def test_a_validation_split_is_taken():
    dataset = DatasetDict({"train": rows("text", "a"), "test": rows("text", "b"), "validation": rows("text", "c")})
    assert split_documents(dataset, None, 0)[1:] == (dataset["validation"], "validation")
    with pytest.raises(ValueError, match="eval_documents=3 has no effect: the dataset has a split 'validation'"):
        split_documents(dataset, 3, 0)
    with pytest.raises(ValueError, match="eval_documents=1: train has 1 documents"):
        split_documents(DatasetDict({"train": rows("text", "a")}), 1, 0)
    with pytest.raises(ValueError, match="eval_documents=0: give at least 1"):
        split_documents(DatasetDict({"train": rows("text", "a", "b")}), 0, 0)
    with pytest.raises(ValueError, match="no split 'train', only test"):
        split_documents(DatasetDict({"test": rows("text", "a")}), None, 0)


# ---- Loading ----


@pytest.mark.parametrize("streaming", [False, True])
def test_the_standard_library(streaming):
    dataset = load_text_dataset("python", streaming=streaming)
    train, evaluation = ([row["text"] for row in dataset[name]] for name in ("train", "validation"))
    assert len(train) > 200 and len(evaluation) > 10
    assert not set(train) & set(evaluation)
    assert sum(map(len, train)) > 5_000_000
    assert any("def dumps(" in text for text in train + evaluation)


def test_a_module_under_two_names_is_one_document(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"module{i:02}.py").write_text(f"number = {i % 25}")
    monkeypatch.setattr("hf_gr.data.text.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    dataset = load_text_dataset("python")
    train, evaluation = dataset["train"]["text"], dataset["validation"]["text"]
    assert sorted([*train, *evaluation]) == sorted(f"number = {i}" for i in range(25))


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n")
    assert [text.strip() for text in load_text_dataset(str(tmp_path / "a.txt"))["train"]["text"]] == [
        "one\nmore",
        "two",
    ]
    rows("content", "x", "y").to_parquet(tmp_path / "b.parquet")
    loaded = load_text_dataset(str(tmp_path / "b.parquet"))
    assert find_text_column(loaded["train"].features) == "content"
    stream = load_text_dataset(str(tmp_path / "b.parquet"), streaming=True)
    assert [row["content"] for row in stream["train"]] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/file.txt", "dataset_name='/no/such/file.txt' could not be loaded"),
        ("/no/such/folder", "dataset_name='/no/such/folder' could not be loaded"),
    ],
)
def test_missing_data_is_named(name, message):
    with pytest.raises(ValueError) as error:
        load_text_dataset(name)
    assert message in str(error.value)
    assert "Give 'python' (embedded), a file" in str(error.value)


def test_columns():
    two = Features({"title": Value("string"), "body": Value("string"), "year": Value("int64")})
    assert find_text_column(two, "body") == "body"
    for name, message in (
        ("bodi", "text_column_name='bodi' is not a column of the dataset, which has title, body, year"),
        ("year", "text_column_name='year' holds Value('int64'), not text"),
        (None, "no column 'text'; its columns are title, body, year. Name one with --text_column_name: title, body"),
    ):
        with pytest.raises(ValueError) as error:
            find_text_column(two, name)
        assert message in str(error.value)


@pytest.mark.parametrize("kind", ["int64", "null"])
def test_a_column_called_text_that_is_none_is_named_with_its_type(kind):
    features = Features({"text": Value(kind)})
    with pytest.raises(ValueError, match=rf"text_column_name='text' holds Value\('{kind}'\), not text"):
        find_text_column(features)
    with pytest.raises(ValueError, match="Name another with --text_column_name: body"):
        find_text_column(Features({"text": Value(kind), "body": Value("string")}))
    with pytest.raises(ValueError, match="No column of the dataset holds text; its columns are year"):
        find_text_column(Features({"year": Value(kind)}))


def test_a_stream_is_asked_for_its_columns():
    stream = IterableDataset.from_generator(lambda: iter([{"body": "a", "year": 1}]))
    assert stream.features is None
    assert find_text_column(features_of({"train": stream})) == "body"


# ---- Null documents ----


def with_nulls() -> DatasetDict:
    return DatasetDict(
        {"train": rows("text", "a", None, "", None), "test": rows("text", "b", "c"), "other": rows("text", None)}
    )


def test_null_documents_are_refused_with_split_row_and_column():
    message = r"split 'train', row 1: column 'text' is null \(2 of 4 examples are like that\)\..*--skip_bad_examples"
    with pytest.raises(ValueError, match=message):
        without_null_documents(with_nulls(), "text", None)


def test_null_documents_are_left_out_and_counted(caplog):
    skipped = Counter()
    kept = without_null_documents(with_nulls(), "text", skipped)
    assert {name: split["text"][:] for name, split in kept.items()} == {"train": ["a", ""], "test": ["b", "c"]}
    assert skipped_metrics(skipped, "test") == {"train_skipped_examples": 2, "eval_skipped_examples": 0}
    assert "2 of 4 examples are left out" in caplog.text
    with pytest.raises(ValueError, match="none is left"):
        without_null_documents(DatasetDict({"train": rows("text", None, None)}), "text", skipped)


def test_null_documents_of_a_stream(caplog):
    stream = IterableDatasetDict({"train": with_nulls()["train"].to_iterable_dataset()})
    kept = without_null_documents(stream, "text", Counter())
    assert list(kept["train"]) == ["a"]
    assert "split 'train', shard 0, row 3: column 'text' is null. It is left out." in caplog.text
    with pytest.raises(ValueError, match="split 'train', shard 0, row 1: column 'text' is null"):
        list(without_null_documents(stream, "text", None)["train"])


def test_null_rows_are_found_beyond_the_first_batch():
    documents = rows("text", *["a"] * 10_001, None, "b")
    assert null_rows(documents, ["text"]) == {10_001: "column 'text' is null"}
    assert null_rows(documents.select([10_001, 0]), ["text"]) == {0: "column 'text' is null"}
