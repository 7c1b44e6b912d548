"""Llamas: no leak, the cost of a run, samples; multiple choice, and what comparing two runs says."""

import math

import pytest
import torch
from datasets import Dataset

import toys
from hf_gr import GRConfig
from hf_gr.comparison import common_target, curve, first_reached, plot_comparison, speedups
from hf_gr.language_modeling import CausalLMTrainer, generate_text, perplexity, steps_for_tokens
from hf_gr.models import LLAMA_PRESETS, create_llama
from hf_gr.multiple_choice import choice_log_likelihoods, evaluate_multiple_choice
from hf_gr.text import train_tokenizer

# ---- Architecture ----


@pytest.mark.parametrize(
    ("preset", "parameters"), [("llama-60m", 65_242_528), ("llama-119m", 133_900_032), ("llama-229m", 228_287_232)]
)
def test_presets_have_their_size(preset, parameters):
    with torch.device("meta"):
        model = create_llama(preset, 50_257)
    assert model.config.vocab_size == 50_304
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("preset", LLAMA_PRESETS)
def test_a_later_token_changes_no_earlier_logit(preset):
    torch.manual_seed(0)
    model = create_llama(preset, 64).eval()
    ids = torch.randint(0, 64, (1, 12))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for position in (5, 11):
            changed = ids.clone()
            changed[0, position] = (ids[0, position] + 1) % 64
            after = model(input_ids=changed).logits
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
            assert (after[:, position:] - before[:, position:]).abs().max() > 1e-4


def test_a_wrong_preset_is_named():
    with pytest.raises(ValueError, match="model='llama-7b': choose one of llama-tiny"):
        create_llama("llama-7b", 64)


# ---- Costs ----


def train(tmp_path, **flags) -> CausalLMTrainer:
    settings = {"include_num_input_tokens_seen": "all", "max_steps": 6, "gr_lambda": 0, **flags}
    args = GRConfig(**toys.arguments(tmp_path, **settings))
    trainer = CausalLMTrainer(toys.llama(), args, train_dataset=toys.text(24), eval_dataset=toys.text(4))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        ({}, 6),
        ({"gr_lambda": None, "gr_warmup_steps": 2}, 6 + 4),
        ({"ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 2, "ire_probe_fraction": 0.5}, 6 + 2 * 0.5),
        ({"ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 0, "ire_mask": "uniform"}, 6),
    ],
    ids=str,
)
def test_passes_and_tokens_are_counted(flags, passes, tmp_path):
    trainer = train(tmp_path, **flags)
    costs = trainer.costs()
    assert costs["train_passes"] == passes
    assert costs["train_tokens"] == 6 * 2 * 12
    assert costs["peak_memory_bytes"] > 10**7
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in logged] == [24 * step for step in range(1, 7)]
    assert logged[-1]["train_passes"] == passes


class Clocked(CausalLMTrainer):
    """Time that stands still but for a second per step and 100 per evaluation."""

    now = 0.0

    def training_step(self, *args, **kwargs):
        Clocked.now += 1
        return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        Clocked.now += 100
        return super().evaluation_loop(*args, **kwargs)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("hf_gr.recording.time.perf_counter", lambda: Clocked.now)


def test_the_clock_stops_for_evaluations(clock, tmp_path):
    args = GRConfig(**toys.arguments(tmp_path, max_steps=4, gr_lambda=0, eval_strategy="steps", eval_steps=2))
    trainer = Clocked(toys.llama(), args, train_dataset=toys.text(24), eval_dataset=toys.text(4))
    trainer.train()
    assert trainer.costs()["train_seconds"] == 4
    entries = trainer.state.log_history
    assert [e["train_seconds"] for e in entries if "loss" in e] == [1, 2, 3, 4]
    assert [e["train_seconds"] for e in entries if "eval_loss" in e] == [2, 4]
    assert all(e["eval_perplexity"] == pytest.approx(math.exp(e["eval_loss"])) for e in entries if "eval_loss" in e)
    trainer.evaluate()
    assert trainer.costs()["train_seconds"] == 4


def test_a_resumed_run_goes_on_counting(clock, tmp_path):
    """What the run had cost that wrote the checkpoint counts; what an earlier train() had cost does not."""
    settings = {"include_num_input_tokens_seen": "all", "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
                "gr_warmup": "none", "ire_kappa": 1.0, "ire_interval": 2, "ire_start_step": 0}  # fmt: skip

    def trainer() -> Clocked:
        return Clocked(toys.llama(), GRConfig(**toys.arguments(tmp_path, **settings)), train_dataset=toys.text(24))

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    costs = [{k: v for k, v in t.costs().items() if k.startswith("train_")} for t in (whole, resumed)]
    assert costs[0] == costs[1] and costs[0]["train_seconds"] == 4
    resumed.train()
    assert [e["train_seconds"] for e in resumed.state.log_history if "loss" in e] == [1, 2, 3, 4]


def test_perplexity_does_not_overflow():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_steps_for_tokens(tmp_path):
    args = GRConfig(**toys.arguments(tmp_path, max_steps=-1, gradient_accumulation_steps=3))
    assert steps_for_tokens(601, args, block_size=100) == 2  # 2 x 3 x 100 in a step
    assert steps_for_tokens(600, args, block_size=100) == 1
    with pytest.raises(ValueError, match="max_train_tokens=0: give at least 1"):
        steps_for_tokens(0, args, 100)
    args.max_steps = 5
    with pytest.raises(ValueError, match="max_train_tokens=9 and max_steps=5 both say how long to train"):
        steps_for_tokens(9, args, 100)


# ---- Text ----


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
    with pytest.raises(ValueError, match="choices_column='options' is not a column of the data set, which has context"):
        evaluate_multiple_choice(model, tokenizer, Dataset.from_dict(questions), choices_column="options")
    with pytest.raises(ValueError, match="The label 2 is not the index of one of 2 choices, 0 to 1"):
        evaluate_multiple_choice(model, tokenizer, Dataset.from_dict({**questions, "label": [2, 0]}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": None}, "row 1: the context is None, not a text"),
        ({"choices": ["a", None]}, "row 1: the choices are ['a', None], not a list of texts"),
        ({"choices": []}, "row 1: the choices are [], not a list of texts"),
        ({"label": 0.5}, "row 1: The label 0.5 is not the index"),
        ({"label": None}, "row 1: The label None is not the index"),
    ],
    ids=str,
)
def test_a_bad_question_is_named_by_its_row(changed, message, talker):
    good = {"context": "the", "choices": [" cat", " mat"], "label": 1.0}  # an index, though a float
    with pytest.raises(ValueError) as error:
        evaluate_multiple_choice(*talker, Dataset.from_list([good, {**good, **changed}]))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="The data set has no questions"):
        evaluate_multiple_choice(*talker, Dataset.from_list([good]).select([]))


# ---- Comparing runs ----


def run(scale: float, seconds: float) -> list[dict]:
    """A loss of 4 - scale * step."""
    return [
        {"step": s, "loss": 4 - scale * s, "num_input_tokens_seen": 100 * s, "train_seconds": seconds * s}
        for s in range(11)
    ]


def test_speedups_of_straight_lines(tmp_path):
    slow, fast = run(0.1, 1.0), run(0.2, 1.5)
    assert common_target([slow, fast]) == pytest.approx(3.0)
    found = speedups([slow], [fast])
    assert found["steps"] == pytest.approx((10, 5, 2))
    assert found["tokens"] == pytest.approx((1000, 500, 2))
    assert found["seconds"] == pytest.approx((10, 7.5, 10 / 7.5))
    assert "passes" not in found  # not logged
    assert speedups([slow], [fast], target=3.87)["steps"][0] == pytest.approx(1.3)
    assert speedups([slow], [fast], target=1.0)["steps"][:2] == (math.inf, math.inf)
    assert math.isnan(speedups([slow], [fast], target=1.0)["steps"][2])  # neither gets there
    assert speedups([slow, fast], [fast, fast])["steps"] == pytest.approx((7.5, 5, 1.5))
    plot_comparison([slow], [fast], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_one_lucky_point_does_not_reach_a_smoothed_target():
    lucky = [{"step": s, "loss": 1.0 if s == 2 else 4.0 - 0.1 * s} for s in range(11)]
    assert first_reached(*curve(lucky, "steps"), 3.2) < 2
    assert first_reached(*curve(lucky, "steps", window=5), 3.0) > 2
    x, y = curve(lucky, "steps", window=5)
    assert (x[0], y[0]) == (4, pytest.approx((4 + 3.9 + 1 + 3.7 + 3.6) / 5))
    with pytest.raises(ValueError, match="window=12: the run has logged 'loss' 11 times"):
        curve(lucky, "steps", window=12)
