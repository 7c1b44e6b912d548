"""What every entry of every table keeps: a new warmup, ascent, optimizer or preset is tested by being there."""

import math
import re
from itertools import chain

import pytest
import torch
from matplotlib.mathtext import MathTextParser

from hf_gr.config import GR_PRESETS, IRE_PRESETS, GRArguments
from hf_gr.models.presets import IMAGE_PRESETS, LLAMA_PRESETS
from hf_gr.optim import IRE, OPTIMIZERS
from hf_gr.optim.ascents import ASCENTS, first_moment
from hf_gr.optim.gr_warmup import GR_WARMUPS, gr_strength
from hf_gr.optim.gradient_regularization import CITATION, Perturbation, gradient_norm
from hf_gr.optim.gradient_reuse import CITATION as REUSE_CITATION
from hf_gr.optim.radius_rules import RADIUS_RULES
from hf_gr.optim.second_passes import SECOND_PASSES

TABLES = {"gr_warmup": GR_WARMUPS, "gr_ascent": ASCENTS, "gr_radius_rule": RADIUS_RULES,
          "gr_second_pass_kind": SECOND_PASSES, "optim": OPTIMIZERS, "around": {"ire": IRE}}  # fmt: skip
PRESETS = {"image": IMAGE_PRESETS, "llama": LLAMA_PRESETS, "gr": GR_PRESETS}
ENTRIES = [pytest.param(entry, id=f"{kind} {name}") for kind, table in TABLES.items() for name, entry in table.items()]
ALL = ENTRIES + [pytest.param(e, id=f"{kind} {name}") for kind, table in PRESETS.items() for name, e in table.items()]


@pytest.mark.parametrize("entry", ALL)
def test_help_is_a_part_of_a_sentence(entry):
    """It stands in a list in `--help`, where argparse takes % for its own, and in the cell of a table."""
    assert entry.help and not set("%|\n;") & set(entry.help) and not entry.help.endswith(".")


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_equation_is_latex(entry):
    assert "$" not in entry.latex and "\n" not in entry.latex
    MathTextParser("path").parse(f"${entry.latex}$".replace(r"\le ", r"\leq "))  # of the two it knows one


CITED = [entry.citation for entry in chain(ASCENTS.values(), OPTIMIZERS.values(), [IRE])]
CITED += [entry.citation for entry in [*RADIUS_RULES.values(), *SECOND_PASSES.values()] if entry.citation]


@pytest.mark.parametrize("bibtex", [CITATION, REUSE_CITATION, *CITED])
def test_the_citation_is_bibtex_with_an_address(bibtex):
    references = re.findall(r"^@\w+\{(\w+),\n((?:  .*\n)+)\}$", bibtex, re.MULTILINE)
    assert references and "\n".join(f"@{m}" for m in bibtex.split("@")[1:]).replace("\n\n", "\n") == bibtex
    for _, fields in references:
        known = dict(re.findall(r"^  (\w+) *= \{(.*)\},?$", fields, re.MULTILINE))
        assert known.keys() >= {"title", "author", "year", "url"} and known["url"].startswith("https://")
        assert len(known) == fields.count("\n") and fields.count("{") == fields.count("}")


# ---- Warmups ----


@pytest.mark.parametrize("lambda_", [0.03, 0.1, 0.25])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 13])
@pytest.mark.parametrize("warmup", GR_WARMUPS)
def test_a_warmup_climbs_from_nothing_to_full_strength(warmup, warmup_steps, lambda_):
    r = 0.1
    path = [gr_strength(s, r=r, lambda_=lambda_, warmup=warmup, warmup_steps=warmup_steps) for s in range(30)]
    assert all(0 <= now.lambda_t <= lambda_ and 0 <= now.r_t <= r for now in path)
    assert path == sorted(path)
    assert path[warmup_steps:] == [(lambda_, r)] * (30 - warmup_steps)
    assert all(now.r_t > 0 or now.lambda_t == 0 for now in path)  # lambda_t / r_t is asked for


# ---- Ascents ----


def with_gradients(shape=(3, 4)) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (shape, (5,))]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def after_a_step(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer whose momentum is the gradient."""
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("ascent", ASCENTS)
def test_an_ascent_moves_and_comes_back(ascent):
    params = with_gradients()
    before, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    perturbation = Perturbation(params, ascent, after_a_step(params))
    perturbation.apply(0.1, gradient_norm(params))
    moved = [p.detach() - start for p, start in zip(params, before, strict=True)]
    slope = sum((step * g).sum() for step, g in zip(moved, grads, strict=True)) / 0.1
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
    if ASCENTS[ascent].passes > 1:  # to first order the loss climbs, as fast as it says
        assert slope > 0 and perturbation.slope == pytest.approx(slope.item(), rel=1e-5)
    else:
        assert slope < 0
    perturbation.restore()
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))


@pytest.mark.parametrize("ascent", ASCENTS)
def test_what_an_ascent_has_no_direction_for_stays(ascent):
    params = with_gradients()
    params[1].grad = None
    optimizer = after_a_step(params)
    before = [p.detach().clone() for p in params]
    perturbation = Perturbation(params, ascent, optimizer)
    perturbation.apply(0.1, gradient_norm(params))
    assert [torch.equal(p, start) for p, start in zip(params, before, strict=True)] == [False, True]
    perturbation.restore()
    assert torch.equal(params[0], before[0]) and params[1].grad is None


@pytest.mark.parametrize("ascent", ASCENTS)
def test_an_ascent_of_nothing_goes_nowhere(ascent):
    params = with_gradients()
    for p in params:
        p.grad.zero_()
    before = [p.detach().clone() for p in params]
    Perturbation(params, ascent, after_a_step(params)).apply(0.1, 0.0)
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))


@pytest.mark.parametrize("ascent", ["gradient", "momentum"])
def test_they_go_as_far_as_the_radius(ascent):
    params = with_gradients()
    before = [p.detach().clone() for p in params]
    Perturbation(params, ascent, after_a_step(params)).apply(0.1, gradient_norm(params))
    assert math.hypot(*((p.detach() - b).norm() for p, b in zip(params, before, strict=True))) == pytest.approx(0.1)


def test_only_a_moment_of_the_shape_of_the_weights_can_be_followed():
    (p, _), optimizer = with_gradients(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert first_moment(optimizer, p) is None
    for key, m, expected in (
        ("momentum_buffer", None, None),
        ("exp_avg", torch.ones(2, 4), None),  # of a projection to a lower rank
        ("momentum_buffer", torch.ones(3, 4), torch.ones(3, 4)),
    ):
        optimizer.state[p][key] = m
        assert expected is first_moment(optimizer, p) or torch.equal(first_moment(optimizer, p), expected)


def test_asam_does_not_depend_on_the_scale_of_the_weights():
    """Scaling theta by 1/a scales the gradient by a; with eta = 0, T^2 g1 / ||T g1|| scales as theta does."""
    params = with_gradients()
    scaled = with_gradients()
    factor = 1e4  # so that eta does not matter
    for p, q in zip(params, scaled, strict=True):
        p.data.mul_(factor)
        q.data.mul_(2 * factor)
        q.grad.div_(2)
    steps = []
    for group in (params, scaled):
        before = [p.detach().clone() for p in group]
        Perturbation(group, "adaptive").apply(0.5, gradient_norm(group))
        steps.append([p.detach() - start for p, start in zip(group, before, strict=True)])
    for small, large in zip(*steps, strict=True):
        torch.testing.assert_close(2 * small, large, rtol=1e-3, atol=0)


# ---- Radius rules ----


@pytest.mark.parametrize("rule", RADIUS_RULES)
def test_a_radius_is_capped_or_what_the_warmup_gives(rule):
    entry = RADIUS_RULES[rule]
    radii = [entry.function(0.1, norm, 0.2) for norm in torch.tensor([0.0, 1e-30, 0.5, 1.0, 2.0, 1e30])]
    assert all(0 <= radius <= 0.2 for radius in radii) and entry.function(0.1, torch.ones(()), 0.2) == pytest.approx(
        0.1
    )
    assert entry.is_capped == (radii != [0.1] * 6)


# ---- Optimizers and presets ----


@pytest.mark.parametrize("name", GR_PRESETS)
def test_a_preset_of_gr_is_what_its_flags_say(name):
    flags = GR_PRESETS[name].flags
    args = GRArguments(gr_preset=name)
    assert {flag: getattr(args, flag) for flag in flags} == flags
    assert not args.flags_without_effect("gr_")
    assert GRArguments(gr_preset=name, gr_r=0.123).gr_r == 0.123


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_symbols_of_an_optimizer_are_those_of_its_settings(name):
    cls = OPTIMIZERS[name]
    needed = {"tv_lambda": 1.0, "delay_steps": 1.0} if name == "tvlars" else {}
    optimizer = cls([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, **needed)
    assert cls.symbols.keys() <= optimizer.defaults.keys()


@pytest.mark.parametrize("preset", IRE_PRESETS.values(), ids=IRE_PRESETS)
def test_a_preset_of_ire_sets_flags_of_ire(preset):
    assert preset.keys() <= {"ire_kappa", "ire_gamma", "ire_start_step"}
