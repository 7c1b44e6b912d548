"""Warmups, ascents, optimizers and presets from outside the package: one entry each, known everywhere."""

import pytest
import torch
from transformers import HfArgumentParser

from helpers import pages, toys
from hf_gr import GRArguments, GRConfig, GRTrainer, create_optimizer, list_optimizers
from hf_gr.config import IRE_PRESETS
from hf_gr.models.presets import (
    IMAGE_PRESETS,
    LLAMA_PRESETS,
    VIT_PRESETS,
    LlamaPreset,
    Preset,
    create_image_model,
    create_llama,
)
from hf_gr.optim import OPTIMIZERS
from hf_gr.optim.ascents import ASCENTS, Ascent
from hf_gr.optim.gr_warmup import GR_WARMUPS, Warmup
from hf_gr.optim.radius_rules import RADIUS_RULES, RadiusRule
from hf_gr.reporting.methods import methods_tables, table

BIBTEX = """\
@article{%s,
  title  = {On %s},
  author = {Nobody},
  year   = {2026},
  url    = {https://example.org/%s}
}"""


class Scaled(torch.optim.Optimizer):
    """w <- w - lr scale g"""

    help = "plain descent, with a factor"
    latex = r"w \leftarrow w - a\, c\, g"
    citation = BIBTEX % (("scaled",) * 3)
    symbols = {"scale": "c"}

    def __init__(self, params, lr, scale=0.5):
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * group["scale"] * p.grad)


def along_signs(params, norm, optimizer):
    return (p.grad.sign() for p in params), 10.0


@pytest.fixture(autouse=True)
def _entries(monkeypatch):
    half = Warmup(lambda t, warmup_steps: (0.5, 1.0), "half the degree throughout", r"\lambda_t = \lambda / 2")
    monkeypatch.setitem(GR_WARMUPS, "half", half)
    signs = Ascent(along_signs, "along the signs", r"\frac{\mathrm{sign}(g_1)}{10}", BIBTEX % (("signs",) * 3))
    monkeypatch.setitem(ASCENTS, "signs", signs)
    monkeypatch.setitem(RADIUS_RULES, "tenth", RadiusRule(lambda r, norm, r_max: r / 10, "a tenth of r", "r_t / 10"))
    monkeypatch.setitem(OPTIMIZERS, "scaled", Scaled)
    monkeypatch.setitem(IRE_PRESETS, "mild", {"ire_kappa": 0.25})
    shape = VIT_PRESETS["vit-micro"].shape | {"num_hidden_layers": 1}
    monkeypatch.setitem(VIT_PRESETS, "vit-nano", Preset("smaller still", shape))
    monkeypatch.setitem(LLAMA_PRESETS, "llama-nano", LlamaPreset("smaller still", 1, 32, 2, 64, 16))


def test_choices_and_help():
    args = GRArguments(gr_warmup="half", optim="scaled", ire_preset="mild")
    assert (args.gr_warmup, args.optim, args.ire_kappa) == ("half", "scaled", 0.25)
    (args,) = HfArgumentParser(GRConfig).parse_args_into_dataclasses(
        ["--output_dir=x", "--use_cpu", "--gr_warmup=half", "--optim=scaled", "--ire_preset=mild"]
    )
    assert (args.gr_warmup, args.optim, args.ire_kappa) == ("half", "scaled", 0.25)
    shown = " ".join(HfArgumentParser(GRConfig).format_help().split())
    assert "half: half the degree throughout" in shown and "scaled: plain descent, with a factor" in shown
    assert "mild" in shown


@pytest.mark.parametrize(("flag", "name"), [("gr_warmup", "half"), ("gr_ascent", "signs"),
                                              ("gr_radius_rule", "tenth"), ("optim", "scaled"),
                                              ("ire_preset", "mild")])  # fmt: skip
def test_the_message_for_a_mistake(flag, name):
    with pytest.raises(ValueError, match=rf"{flag}='foo': choose one of .*, {name}\."):
        GRArguments(**{flag: "foo"})


def test_by_name_in_a_loop_of_ones_own():
    assert list_optimizers()["scaled"] == Scaled.help
    optimizer = create_optimizer("scaled", [torch.nn.Parameter(torch.ones(2))], lr=0.1, scale=2.0)
    assert (type(optimizer), optimizer.defaults["scale"]) == (Scaled, 2.0)


def test_presets_of_models():
    assert "vit-nano" in IMAGE_PRESETS and "| `vit-nano` | smaller still |" in table(IMAGE_PRESETS)
    assert create_image_model("vit-nano", ["a", "b"]).config.num_hidden_layers == 1
    assert create_llama("llama-nano", 64).config.num_hidden_layers == 1
    with pytest.raises(ValueError, match=r"choose one of .*, vit-nano"):
        create_image_model("foo", ["a"])


def test_the_tables_of_the_docs():
    tables = methods_tables()
    assert r"| `half` | half the degree throughout | $\lambda_t = \lambda / 2$ |" in tables["GR warmups"]
    assert "[On signs](https://example.org/signs)" in tables["Ascents"]
    assert "| `scaled` | plain descent, with a factor |" in tables["Optimizers"]


def test_the_step_and_the_card(tmp_path):
    """g1 and g2 by hand: lambda = r / 2, g2 at theta + r/10 sign(g1) / 10; then w - lr scale g."""
    model, data, r, lr = toys.vit(), toys.images(2), 0.1, 1e-2
    inputs = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(**inputs).loss, params, materialize_grads=True))

    g1 = gradients()
    with torch.no_grad():
        for p, g in zip(params, g1, strict=True):
            p.add_(r / 10 * g.sign() / 10)
    g2 = gradients()
    with torch.no_grad():
        for p, start in zip(params, before, strict=True):
            p.copy_(start)
    expected = [w - lr * 0.25 * (a / 2 + b / 2) for w, a, b in zip(before, g1, g2, strict=True)]

    flags = {"optim": "scaled", "optim_args": "scale=0.25", "gr_r": r, "gr_warmup": "half", "max_grad_norm": 0}
    flags |= {"gr_ascent": "signs", "gr_radius_rule": "tenth"}
    args = GRConfig(**toys.arguments(tmp_path, max_steps=1, learning_rate=lr, **flags))
    trainer = GRTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    assert (torch.cat([p.reshape(-1) for p in expected]) - toys.weights(model)).abs().max() < 1e-6
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-4

    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"$${GR_WARMUPS['half'].latex}$$" in card and f"$$d = {ASCENTS['signs'].latex}$$" in card
    assert f"$${Scaled.latex}$$" in card and "| `scale` | c | 0.25 |" in card
    assert Scaled.citation in card and ASCENTS["signs"].citation in card


def test_the_code_of_the_docs():
    (block,) = pages.blocks(pages.DOCS / "extending.md", "python")
    tables = (GR_WARMUPS, ASCENTS, OPTIMIZERS, VIT_PRESETS)
    before = [set(entries) for entries in tables]
    try:
        exec(block.code, {})
        args = GRArguments(gr_warmup="cosine", optim="descent")
        assert args.gr_strength(4, 10).lambda_t == pytest.approx(0.05)  # in the middle of the warmup: half of lambda
        p = torch.nn.Parameter(torch.ones(2))
        assert type(create_optimizer("descent", [p], lr=0.1)).__name__ == "Descent"
        assert create_image_model("vit-nano", ["a", "b"]).config.num_hidden_layers == 1
        p.grad = torch.tensor([3.0, -4.0])
        directions, length = ASCENTS["signs"].direction([p], 5.0, None)
        torch.testing.assert_close(torch.stack(list(directions)).div(length).norm(), torch.tensor(1.0))
    finally:
        for entries, kept in zip(tables, before, strict=True):
            for name in set(entries) - kept:
                del entries[name]
