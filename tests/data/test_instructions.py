"""Instructions: what is prompt and what is answer, and the metrics of answers."""

from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value

from hf_gr.data.instructions import (
    answer_metrics,
    find_instruction_format,
    prompt_and_answer,
    tokenize_instructions,
    without_bad_examples,
)
from hf_gr.data.text import train_tokenizer
from hf_gr.evaluation import AnswerMatch
from hf_gr.models.presets import create_llama

ALPACA = {
    "instruction": ["Name a colour.", "Add.", "Say nothing.", "Name a fruit."],
    "input": ["", "1 and 2", "", ""],
    "output": ["Blue.", "3", " ", "Apple, of course, and many others."],
}
CHAT = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "See you."},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ALPACA["instruction"] * 5, 300, 512)


def test_only_the_answer_and_its_end_are_labels(tokenizer):
    tokens = tokenize_instructions(Dataset.from_dict(ALPACA), tokenizer, 400)
    assert len(tokens) == 3  # an empty answer teaches nothing
    for row, i in zip(tokens, (0, 1, 3), strict=True):
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned[:-1]) == ALPACA["output"][i]
        assert learned[-1] == tokenizer.eos_token_id
        assert row["input_ids"][-len(learned) :] == learned
        prompt = tokenizer.decode(row["input_ids"][: -len(learned)])
        assert prompt.endswith("### Response:\n") and ALPACA["instruction"][i] in prompt
        assert ("### Input:\n1 and 2\n" in prompt) == (i == 1)
        assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_what_is_too_long_is_cut_and_dropped_if_no_answer_is_left(tokenizer):
    rows = Dataset.from_dict(ALPACA)
    whole = tokenize_instructions(rows, tokenizer, 400)
    limit = len(whole[0]["input_ids"]) + 3
    cut = tokenize_instructions(rows, tokenizer, limit)
    assert max(map(len, cut["input_ids"])) <= limit
    assert len(cut) == 2  # the prompt with an input alone is longer
    with pytest.raises(ValueError, match="max_length=10: no example has an answer within that many tokens"):
        tokenize_instructions(rows, tokenizer, 10)


def test_chats(tokenizer):
    import copy

    rows = Dataset.from_dict({"messages": [CHAT]})
    with pytest.raises(ValueError, match="The dataset has chats, but the tokenizer has no chat template"):
        tokenize_instructions(rows, tokenizer, 400)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    (row,) = tokenize_instructions(rows, chatty, 400)
    assert chatty.decode([label for label in row["labels"] if label != -100]) == "See you.</s>"
    assert chatty.decode(row["input_ids"]).startswith("<user>Hello?</s><assistant>Hi.</s><user>Bye.</s><assistant>See")
    with pytest.raises(ValueError, match="A chat ends with a message of the 'user'"):
        prompt_and_answer({"messages": CHAT[:3]}, chatty)


def bad(**changed) -> DatasetDict:
    """The third of four rows has other values."""
    columns = {name: list(values) for name, values in ALPACA.items()}
    for name, value in changed.items():
        columns[name][2] = value
    return DatasetDict({"train": Dataset.from_dict(columns), "validation": Dataset.from_dict(ALPACA)})


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_a_missing_text_is_named_or_left_out(column, tokenizer):
    with pytest.raises(ValueError, match=f"split 'train', row 2: column '{column}' is null .*--skip_bad_examples"):
        without_bad_examples(bad(**{column: None}), None)
    skipped = Counter()
    kept = without_bad_examples(bad(**{column: None}), skipped)
    assert skipped == {"train": 1}
    assert kept["train"]["instruction"][:] == [ALPACA["instruction"][i] for i in (0, 1, 3)]
    text = [tokenizer.decode(row) for row in tokenize_instructions(kept["train"], tokenizer, 400)["input_ids"]]
    assert not any("None" in row for row in text)


def test_a_missing_input_is_none(tokenizer):
    kept = without_bad_examples(bad(input=None), None)
    assert len(kept["train"]) == 4 and prompt_and_answer(kept["train"][2], tokenizer)[0].count("###") == 2


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (None, "is null"),
        ([], "has 0 messages"),
        (CHAT[1:2], "has 1 messages"),
        ([CHAT[0], {"role": "assistant", "content": None}], "has no 'content' in message 1"),
        ([{"role": None, "content": "?"}, CHAT[1]], "has no 'role' in message 0"),
        (CHAT[:3], "ends with a message of the 'user'"),
    ],
    ids=str,
)
def test_a_chat_without_a_message_is_named_or_left_out(chat, reason):
    dataset = DatasetDict({"train": Dataset.from_dict({"messages": [CHAT, chat]})})
    with pytest.raises(ValueError, match=f"split 'train', row 1: column 'messages' {reason}"):
        without_bad_examples(dataset, None)
    assert without_bad_examples(dataset, Counter())["train"]["messages"][:] == [CHAT]


def test_answers_that_are_dropped_are_counted(tokenizer, caplog):
    rows = Dataset.from_dict(ALPACA)
    tokenize_instructions(rows, tokenizer, 400)
    assert "1 of 4 examples are dropped: 1 have an empty answer, 0 none within max_length=400" in caplog.text
    limit = len(tokenize_instructions(rows, tokenizer, 400)[0]["input_ids"]) + 3
    tokenize_instructions(rows, tokenizer, limit)
    assert f"2 of 4 examples are dropped: 1 have an empty answer, 1 none within max_length={limit}" in caplog.text


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_length_below_one_is_refused(max_length, tokenizer):
    with pytest.raises(ValueError, match=f"max_length={max_length}: must be at least 1"):
        tokenize_instructions(Dataset.from_dict(ALPACA), tokenizer, max_length)


def test_formats():
    assert find_instruction_format(Dataset.from_dict(ALPACA).features) == "alpaca"
    with pytest.raises(ValueError, match=r"column 'output' holds Value\('int64'\), not text"):
        find_instruction_format(Features({"instruction": Value("string"), "output": Value("int64")}))
    with pytest.raises(ValueError, match=r"The dataset has the columns question, answer\. It needs 'instruction' and"):
        find_instruction_format(Features({"question": Value("string"), "answer": Value("string")}))


def test_answer_match_equals_counting():
    metric = AnswerMatch(keep_in_memory=True)
    result = metric.compute(
        predictions=["The cat sat", "a b c d", "", "x", ""], references=["the  CAT sat", "b x d a", "y", "", ""]
    )
    assert result["exact_match"] == pytest.approx(2 / 5)
    # b d is the longest common subsequence of two words: 2 * 2 / (4 + 4)
    assert result["rouge_l"] == pytest.approx((1 + 0.5 + 0 + 0 + 1) / 5)


def test_answers_are_written_and_compared(tokenizer):
    """A model that has learned one answer by heart writes it, and stops."""
    torch.manual_seed(0)
    model = create_llama("llama-tiny", len(tokenizer), 256, tokenizer.eos_token_id)
    rows = Dataset.from_dict({key: values[:1] for key, values in ALPACA.items()})
    tokens = tokenize_instructions(rows, tokenizer, 256).with_format("torch")[:1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(**tokens).loss.backward()
        optimizer.step()
    assert answer_metrics(model, tokenizer, rows, 16) == {"exact_match": 1.0, "rouge_l": 1.0}
