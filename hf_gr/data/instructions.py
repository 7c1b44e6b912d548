"""Instruction data: tokenized prompts and answers, where only the answers count in the loss."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import AnswerMatch, compute, generate_text
from .text import is_text, leave_out, null_rows, used_splits

logger = logging.getLogger(__name__)

ALPACA_COLUMNS = ("instruction", "output")  # and "input", which may be missing or empty
#: The prompts that the Alpaca models were trained with, verbatim, for results that can be compared with theirs.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)


def find_instruction_format(features: Features) -> str:
    """`alpaca` (columns instruction, output and optionally input) or `messages` (a column of chats).

    Raises:
        ValueError: the columns match neither format, or do not hold text.
    """
    if "messages" in features:
        return "messages"
    if all(column in features for column in ALPACA_COLUMNS):
        for column in (*ALPACA_COLUMNS, "input"):
            kind = features.get(column, Value("string"))
            if not is_text(kind) and not (column == "input" and kind == Value("null")):
                raise ValueError(f"column {column!r} holds {kind}, not text. Write its values as strings.")
        return "alpaca"
    raise ValueError(
        f"The dataset has the columns {', '.join(features)}. It needs 'instruction' and 'output', optionally 'input'; "
        "or 'messages', each a list of {'role', 'content'}."
    )


def without_bad_examples(dataset: DatasetDict, skipped: Counter[str] | None) -> DatasetDict:
    """The splits in use, without rows that lack an instruction, an answer or a message.

    Args:
        skipped: counts such rows by split; if None, they are an error.
    """
    is_chat = find_instruction_format(next(iter(dataset.values())).features) == "messages"
    find = _bad_chats if is_chat else lambda split: null_rows(split, ALPACA_COLUMNS)
    splits = {name: dataset[name] for name in used_splits(dataset)}
    return DatasetDict({name: leave_out(split, name, find(split), skipped) for name, split in splits.items()})


def _bad_chats(dataset: Dataset) -> dict[int, str]:
    reasons = (_why_bad(row["messages"]) for row in dataset.select_columns(["messages"]))
    return {row: f"column 'messages' {reason}" for row, reason in enumerate(reasons) if reason is not None}


def _why_bad(chat: Any) -> str | None:
    if chat is None:
        return "is null"
    if not isinstance(chat, list) or not all(isinstance(message, Mapping) for message in chat):
        return "is not a list of {'role', 'content'}"
    if len(chat) < 2:
        return f"has {len(chat)} messages, not a question and an answer"
    for i, message in enumerate(chat):
        for key in ("role", "content"):
            if message.get(key) is None:
                return f"has no {key!r} in message {i}"
    return None if chat[-1]["role"] == "assistant" else f"ends with a message of the {chat[-1]['role']!r}"


def prompt_and_answer(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text up to the answer, and the answer. In a chat, the answer is the last message, by the assistant."""
    if "messages" in example:
        *before, last = example["messages"]
        if last["role"] != "assistant":
            raise ValueError(f"A chat ends with a message of the {last['role']!r}. The last must be the assistant's.")
        prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(example["messages"], tokenize=False))
        if not whole.startswith(prompt):
            raise ValueError("The chat template does not put the answer after its generation prompt. Use another one.")
        return prompt, whole[len(prompt) :]
    template = ALPACA_PROMPT_WITH_INPUT if example.get("input") else ALPACA_PROMPT
    return template.format(**example), example["output"]


def tokenize_instructions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Dataset:
    """`input_ids`, `attention_mask` and `labels`: -100 for the prompt, then the tokens of the answer and its end.

    Longer examples are truncated to `max_length` tokens. Those without an answer, before or after truncation, are
    dropped and counted in a warning.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: must be at least 1 token. Raise it.")
    if find_instruction_format(dataset.features) == "messages" and tokenizer.chat_template is None:
        raise ValueError("The dataset has chats, but the tokenizer has no chat template. Set tokenizer.chat_template.")
    ends = [] if "messages" in dataset.features else [tokenizer.eos_token_id]  # a chat template writes its own

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = prompt_and_answer(example, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + ends if answer.strip() else []
        ids = (prompt_ids + answer_ids)[:max_length]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": ([-100] * len(prompt_ids) + answer_ids)[:max_length],
            "kept": bool(answer_ids) and len(prompt_ids) < max_length,
            "empty": not answer_ids,
        }

    tokens = dataset.map(tokenize, remove_columns=dataset.column_names, num_proc=num_proc, desc="Tokenizing")
    kept = tokens.filter(lambda kept: kept, input_columns="kept", desc="Dropping empty answers")
    if not len(kept):
        raise ValueError(
            f"max_length={max_length}: no example has an answer within that many tokens. Raise it, or look at the data."
        )
    if dropped := len(tokens) - len(kept):
        empty = sum(tokens["empty"])
        logger.warning(
            f"{dropped:,} of {len(tokens):,} examples are dropped: {empty:,} have an empty answer, {dropped - empty:,} "
            f"none within max_length={max_length} tokens."
        )
    return kept.remove_columns(["kept", "empty"])


@torch.no_grad()
def answer_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[dict[str, Any]],
    max_new_tokens: int = 64,
) -> dict[str, float]:
    """Exact match and ROUGE-L of greedy answers, between 0 and 1."""
    pairs = [prompt_and_answer(example, tokenizer) for example in examples]
    answers = [generate_text(model, tokenizer, prompt, max_new_tokens) for prompt, _ in pairs]
    return compute(AnswerMatch, predictions=answers, references=[answer for _, answer in pairs])
