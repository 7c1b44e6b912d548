"""Instruction data: prompts and answers as tokens, where only the answers count in the loss."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, Features
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .language_modeling import generate_text
from .metrics import AnswerMatch, compute

ALPACA_COLUMNS = ("instruction", "output")  # and "input", which may be missing or empty
#: The prompts that the Alpaca models were trained with; what is to be compared with them needs them to the letter.
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
    """`alpaca` (columns instruction, output and perhaps input) or `messages` (a column of chats)."""
    if "messages" in features:
        return "messages"
    if all(column in features for column in ALPACA_COLUMNS):
        return "alpaca"
    raise ValueError(
        f"The data set has the columns {', '.join(features)}. It needs 'instruction' and 'output', perhaps 'input'; "
        "or 'messages', each a list of {'role', 'content'}."
    )


def prompt_and_answer(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text up to the answer, and the answer. Of a chat the answer is the last message, which is the assistant's."""
    if "messages" in example:
        *before, last = example["messages"]
        if last["role"] != "assistant":
            raise ValueError(f"A chat ends with a message of the {last['role']!r}; the last one is to be learned.")
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(example["messages"], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError("The chat template does not put the answer behind its generation prompt. Use another one.")
        return prompt, whole[len(prompt) :]
    template = ALPACA_PROMPT_WITH_INPUT if example.get("input") else ALPACA_PROMPT
    return template.format(**example), example["output"]


def tokenize_instructions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Dataset:
    """`input_ids`, `attention_mask` and `labels`: -100 for the prompt, the tokens of the answer and of its end.

    What is longer than `max_length` is cut at its end; an example of which no answer is left, or whose answer is
    empty, is dropped.
    """
    if find_instruction_format(dataset.features) == "messages" and tokenizer.chat_template is None:
        raise ValueError("The data set has chats, and the tokenizer no chat template. Set tokenizer.chat_template.")
    ends = [] if "messages" in dataset.features else [tokenizer.eos_token_id]  # a chat template writes its own

    def tokenize(example: dict[str, Any]) -> dict[str, list[int]]:
        prompt, answer = prompt_and_answer(example, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + ends if answer.strip() else []
        ids = (prompt_ids + answer_ids)[:max_length]
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": ([-100] * len(prompt_ids) + answer_ids)[:max_length],
        }

    tokens = dataset.map(tokenize, remove_columns=dataset.column_names, num_proc=num_proc, desc="Tokenizing")
    kept = tokens.filter(
        lambda example: any(label != -100 for label in example["labels"]), desc="Dropping empty answers"
    )
    if not len(kept):
        raise ValueError(
            f"max_length={max_length}: no example has an answer within so many tokens. Raise it, or look at the data."
        )
    return kept


@torch.no_grad()
def answer_metrics(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[dict[str, Any]],
    max_new_tokens: int = 64,
) -> dict[str, float]:
    """Exact match and ROUGE-L of greedy answers, between 0 and 1."""
    pairs = [prompt_and_answer(example, tokenizer) for example in examples]
    answers = [generate_text(model, tokenizer, prompt, max_new_tokens) for prompt, _ in pairs]
    return compute(AnswerMatch, predictions=answers, references=[answer for _, answer in pairs])
