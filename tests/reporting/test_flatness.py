"""The section "Flatness" of a card: what was measured, when and on what, from the record alone."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from torch import ones_like

from helpers import toys
from hf_gr import SharpnessCallback
from hf_gr.analysis import Estimate
from hf_gr.cli import command
from hf_gr.reporting.card import write_card
from hf_gr.reporting.record import SharpnessFacts, read_record, write_record

FEW = {"trace": {"num_samples": 2}, "average": {"num_samples": 2}, "top": {"tolerance": 0.1}}
SAM = {"quantities": ("sam",), "batches": 1}


def card_of(trainer) -> str:
    trainer.create_model_card()
    return (Path(trainer.args.output_dir) / "README.md").read_text()


def flatness(card: str) -> str | None:
    found = re.search(r"^## Flatness\n(.*?)^## ", card, re.MULTILINE | re.DOTALL)
    return found and found.group(1)


def table(card: str) -> dict[str, str]:
    """Quantity -> the cell with its value."""
    return {row[1].strip(" `"): row[-2].strip() for line in flatness(card).splitlines()
            if len(row := line.split("|")) == 5 and "`" in row[1]}  # fmt: skip


def shown(name: str, estimate: Estimate) -> str:
    error = f"{estimate.standard_error:.2g}"
    ends = {"sam": "", "average": f" ± {error}", "trace": f" ± {error}", "top": f" (residual {error})"}
    return f"{estimate.value:.4g}{ends[name]}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run measured at its end: the trainer, what was returned, and the card."""
    trainer = toys.trainer(tmp_path_factory.mktemp("run"), eval_dataset=toys.images(6), gr_warmup="none", max_steps=2)
    trainer.train()
    found = trainer.sharpness(batches=2, **FEW)
    return trainer, found, card_of(trainer)


def test_the_card_shows_what_was_returned(measured):
    _, found, card = measured
    assert len(found) == 4
    assert table(card) == {name: shown(name, estimate) for name, estimate in found.items()}
    text = flatness(card)
    assert "at step 2 of 2, in evaluation mode, on the first 2 batches of 8 examples of the training data." in text
    assert "Sharpness is not generalization" in text and "https://arxiv.org/abs/2302.07011" in text
    for formula in (
        r"$L(\theta + r\, g / \Vert g \Vert) - L(\theta)$ with r = 0.05 |",
        r"$E\, L(\theta + \sigma \vert \theta \vert\, z) - L(\theta)$ with sigma = 0.05 and 2 draws of z ~ N(0, 1) |",
        r"tr(H), the mean of $z \cdot H z$ over 2 vectors z of random signs |",
        r"$\lambda_{\max}(H)$ |",
    ):
        assert formula in text
    assert "Nothing beyond the\ntables of results and flatness was measured" in card


def test_it_is_made_again_from_the_record(measured, tmp_path):
    trainer, _, card = measured
    (tmp_path / "run.json").write_bytes((Path(trainer.args.output_dir) / "run.json").read_bytes())
    command.main(["card", str(tmp_path)])
    assert flatness((tmp_path / "README.md").read_text()) == flatness(card)


def test_options_and_data_are_those_of_the_measurement(measured):
    trainer, _, _ = measured
    preconditioner = [ones_like(p) for p in trainer.model.parameters()]
    options = {"sam": {"r": 0.1, "adaptive": True}, "average": {"sigma": 0.2, "adaptive": False, "num_samples": 1},
               "top": {"preconditioner": preconditioner, "tolerance": 0.1}}  # fmt: skip
    found = trainer.sharpness(1, ("sam", "average", "top"), trainer.eval_dataset, **options)
    card = card_of(trainer)
    text = flatness(card)
    assert "on the first batch of 6 examples of the evaluation set." in text
    assert r"$L(\theta + r\, d) - L(\theta)$ with r = 0.1 and d the direction of ASAM |" in text
    assert r"$E\, L(\theta + \sigma z) - L(\theta)$ with sigma = 0.2 and 1 draw of z" in text
    assert r"$\lambda_{\max}(P^{-1} H)$ with a preconditioner P |" in text and "`trace`" not in text
    assert table(card)["average"] == f"{found['average'].value:.4g}"  # of one draw there is no standard error
    options = read_record(trainer.args.output_dir).sharpness.options
    assert options["sam"] == {"r": 0.1, "adaptive": True} and options["top"]["preconditioner"] is True
    trainer.sharpness(**SAM, dataset=toys.images(3))
    assert "of 3 examples of other data." in flatness(card_of(trainer))


def test_a_measurement_after_the_card_is_in_the_record(measured):
    trainer, _, _ = measured
    card_of(trainer)
    folder = Path(trainer.args.output_dir)
    before = json.loads((folder / "run.json").read_text())
    found = trainer.sharpness(**SAM)
    after = json.loads((folder / "run.json").read_text())
    assert {key for key in after if after[key] != before[key]} == {"sharpness"}
    write_card(folder)
    assert table((folder / "README.md").read_text()) == {"sam": shown("sam", found["sam"])}


def test_a_run_that_was_not_measured_has_no_such_section(tmp_path):
    trainer = toys.trainer(tmp_path, max_steps=1)
    trainer.train()
    assert "Flatness" not in card_of(trainer) and "arxiv.org/abs/2302.07011" not in card_of(trainer)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content.pop("sharpness") is None
    (tmp_path / "run.json").write_text(json.dumps(content))  # as before there was such a field
    assert read_record(tmp_path).sharpness is None


def test_the_last_entry_of_the_callback(tmp_path):
    trainer = toys.trainer(tmp_path, gr_warmup="none", max_steps=3)
    trainer.add_callback(SharpnessCallback(trainer, every=2, **SAM))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "sharpness_sam" in entry]
    card = card_of(trainer)
    assert "at step 2 of 3, in" in card and table(card) == {"sam": f"{entry['sharpness_sam']:.4g}"}


def test_before_training(tmp_path):
    trainer = toys.trainer(tmp_path, max_steps=1)
    found = trainer.sharpness(**SAM)
    card = card_of(trainer)
    assert "theta before training, in" in card and table(card) == {"sam": shown("sam", found["sam"])}
    trainer.train()
    card = card_of(trainer)
    assert "at step 0 of 1, in" in card and table(card) == {"sam": shown("sam", found["sam"])}


def test_a_record_with_a_measurement_is_read_as_it_was_written(measured, tmp_path):
    record = read_record(measured[0].args.output_dir)
    facts = SharpnessFacts(3, "eval_f*r", 8, None, {"top": {"value": math.inf, "standard_error": math.nan}},
                           {"top": {"preconditioner": False}})  # fmt: skip
    write_record(dataclasses.replace(record, sharpness=facts), tmp_path)
    assert repr(read_record(tmp_path).sharpness) == repr(facts)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert r"on the first 8 batches of the evaluation set f\*r." in text and table(text) == {"top": "inf"}
