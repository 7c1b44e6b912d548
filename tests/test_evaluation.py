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
    expected_calibration_error,
    generate_text,
    rank_classes,
)
from hf_gr.models.presets import create_llama


def metrics_of(logits, labels):
    predictions = tuple(values.numpy() for values in rank_classes(logits, labels))
    return classification_metrics(EvalPrediction(predictions=predictions, label_ids=labels.numpy()))


@pytest.mark.parametrize("classes", [4, 10, 11, 100])
def test_metrics_equal_counting(classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(300, classes), torch.randint(0, classes, (300,))
    metrics = metrics_of(logits, labels)
    right = np.mean([int(np.argmax(row) == label) for row, label in zip(logits.numpy(), labels.numpy(), strict=True)])
    assert metrics["accuracy"] == pytest.approx(right)
    assert metrics["error"] == pytest.approx(1 - right)
    assert ("top5_accuracy" in metrics) == (classes > 10)
    if classes > 10:
        five = [label in np.argsort(-row)[:5] for row, label in zip(logits.numpy(), labels.numpy(), strict=True)]
        assert metrics["top5_accuracy"] == pytest.approx(np.mean(five))


def test_unlabelled_examples_do_not_count_as_errors():
    logits = torch.tensor([[0.0, 1.0], [0.0, 9.0], [1.0, 0.0]])
    metrics = metrics_of(logits, torch.tensor([1, -100, 0]))
    assert (metrics["accuracy"], metrics["error"]) == (1, 0)
    assert metrics["nll"] == pytest.approx(math.log(1 + math.exp(-1)))
    assert metrics["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    with pytest.raises(ValueError, match="no labeled examples"):
        metrics_of(logits[:1], torch.tensor([-100]))


def test_rank_classes_takes_the_logits_out_of_a_tuple():
    logits = torch.tensor([[0.1, 0.9]])
    best, confidence, nll = rank_classes((logits, torch.zeros(1)), None)
    assert best.tolist() == [[1]]
    assert confidence.tolist() == pytest.approx([1 / (1 + math.exp(-0.8))])
    assert nll.isnan().all()


def test_calibration_error_equals_going_through_the_bins():
    generator = np.random.default_rng(0)
    confidence, is_right = generator.random(500).astype(np.float32), generator.random(500) < 0.6
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(is_right[inside].mean() - confidence[inside].astype(float).mean())
    assert expected_calibration_error(confidence, is_right) == pytest.approx(expected, rel=1e-12)


def test_calibration_error_in_closed_form():
    sure = np.ones(10)
    assert expected_calibration_error(sure, sure > 0) == 0
    assert expected_calibration_error(sure, sure < 0) == 1
    # Of 0.8 sure, 8 of 10 are right: well calibrated, also together with others that are wrong and know it.
    assert expected_calibration_error(np.array([0.8] * 10), np.arange(10) < 8) == pytest.approx(0)
    assert expected_calibration_error(np.array([0.8] * 10 + [0.0] * 10), np.arange(20) < 8) == pytest.approx(0)
    assert expected_calibration_error(np.array([0.8] * 10), np.arange(10) < 5) == pytest.approx(0.3)


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
