"""The metrics against counting by hand; samples of text; multiple choice."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction

from hf_gr.data.text import train_tokenizer
from hf_gr.evaluation import (
    choice_log_likelihoods,
    classification_metrics,
    evaluate_multiple_choice,
    generate_text,
    rank_classes,
)
from hf_gr.models.presets import create_llama


@pytest.mark.parametrize("classes", [4, 10, 11, 100])
def test_metrics_equal_counting(classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(300, classes), torch.randint(0, classes, (300,))
    ranked = rank_classes(logits, labels)
    metrics = classification_metrics(EvalPrediction(predictions=ranked.numpy(), label_ids=labels.numpy()))
    right = np.mean([int(np.argmax(row) == label) for row, label in zip(logits.numpy(), labels.numpy(), strict=True)])
    assert metrics["accuracy"] == pytest.approx(right)
    assert metrics["error"] == pytest.approx(1 - right)
    assert ("top5_accuracy" in metrics) == (classes > 10)
    if classes > 10:
        five = [label in np.argsort(-row)[:5] for row, label in zip(logits.numpy(), labels.numpy(), strict=True)]
        assert metrics["top5_accuracy"] == pytest.approx(np.mean(five))


def test_unlabelled_examples_do_not_count_as_errors():
    labels = np.array([1, -100, 0])
    metrics = classification_metrics(EvalPrediction(predictions=np.array([[1], [1], [0]]), label_ids=labels))
    assert metrics == {"accuracy": 1.0, "error": 0.0}
    with pytest.raises(ValueError, match="no labeled examples"):
        classification_metrics(EvalPrediction(predictions=np.zeros((1, 1)), label_ids=np.array([-100])))


def test_rank_classes_takes_the_logits_out_of_a_tuple():
    logits = torch.tensor([[0.1, 0.9]])
    assert rank_classes((logits, torch.zeros(1)), None).tolist() == [[1]]


@pytest.fixture(scope="module")
def talker():
    tokenizer = train_tokenizer(["the cat sat on the mat. "] * 20, 280, 64)
    torch.manual_seed(0)
    return create_llama("llama-tiny", len(tokenizer), 64, tokenizer.eos_token_id), tokenizer


def test_generating_leaves_the_random_state_alone(talker):
    model, tokenizer = talker
    model.train()
    state = torch.get_rng_state()
    first = generate_text(model, tokenizer, "the", 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate_text(model, tokenizer, "the", 10, seed=3) == first
    assert generate_text(model, tokenizer, "", 5) == generate_text(model, tokenizer, "", 5)
    assert model.training


def test_log_likelihood_is_the_sum_over_the_choice(talker):
    model, tokenizer = talker
    model.eval()
    context, choices = "the cat", [" sat on", " mat"]
    scores = choice_log_likelihoods(model, tokenizer, context, choices)
    for choice, score in zip(choices, scores, strict=True):
        ids = tokenizer(context + choice)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        expected = sum(logits[i - 1].log_softmax(-1)[ids[i]].item() for i in range(start, len(ids)))
        assert score == pytest.approx(expected, rel=1e-5)
    # a context too long for the 64 positions loses its beginning
    assert math.isfinite(choice_log_likelihoods(model, tokenizer, "q" * 200, [" sat"])[0])
    assert math.isfinite(choice_log_likelihoods(model, tokenizer, "", ["the"])[0])


def test_multiple_choice_counts(talker):
    model, tokenizer = talker
    questions = {"context": ["the cat", "the"], "choices": [[" sat", " on"], [" mat", " cat on"]], "label": [0, 1]}
    scores = [choice_log_likelihoods(model, tokenizer, *q) for q in zip(*list(questions.values())[:2], strict=True)]
    expected = sum(s.index(max(s)) == label for s, label in zip(scores, questions["label"], strict=True)) / 2
    result = evaluate_multiple_choice(model, tokenizer, Dataset.from_dict(questions))
    assert result["accuracy"] == expected and result["examples"] == 2
    with pytest.raises(ValueError, match="choices_column='options' is not a column of the dataset, which has context"):
        evaluate_multiple_choice(model, tokenizer, Dataset.from_dict(questions), choices_column="options")
    with pytest.raises(ValueError, match="the label 2 is not the index of one of 2 choices, 0 to 1"):
        evaluate_multiple_choice(model, tokenizer, Dataset.from_dict({**questions, "label": [2, 0]}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": None}, "row 1: the context is None, not a text"),
        ({"choices": ["a", None]}, "row 1: the choices are ['a', None], not a list of texts"),
        ({"choices": []}, "row 1: the choices are [], not a list of texts"),
        ({"label": 0.5}, "row 1: the label 0.5 is not the index"),
        ({"label": None}, "row 1: the label None is not the index"),
    ],
    ids=str,
)
def test_a_bad_question_is_named_by_its_row(changed, message, talker):
    good = {"context": "the", "choices": [" cat", " mat"], "label": 1.0}  # an index, though a float
    with pytest.raises(ValueError) as error:
        evaluate_multiple_choice(*talker, Dataset.from_list([good, {**good, **changed}]))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="The dataset has no questions"):
        evaluate_multiple_choice(*talker, Dataset.from_list([good]).select([]))
