"""What a step holds and sends is what the formulas of benchmarks/cost_model.py say; and the formulas, by hand."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from helpers import ROOT

BENCHMARKS = str(ROOT / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Modules of benchmarks/, which are no package; they are forgotten afterwards, as their names are common ones."""
    before = set(sys.modules)
    sys.path.insert(0, BENCHMARKS)
    yield SimpleNamespace(**{name: __import__(name) for name in ("scale", "cost_model", "step_counter")})
    sys.path.remove(BENCHMARKS)
    for name in set(sys.modules) - before:
        if BENCHMARKS in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes written is read from /proc")
def test_two_processes_send_what_the_formulas_say(modules):
    """Payloads as c10d gets them, and bytes as the kernel gets them."""
    scale = modules.scale
    cases = [scale.Case("DDP", step, 1) for step in ("gr global", "gr local")] + [scale.Case("FSDP2", "gr global", 2)]
    counts = scale.count_traffic(2, cases)
    reduced, local, sharded = (scale.compared(case, 2, step) for case, step in counts.items())
    assert (reduced["all-reduce (N)"], local["all-reduce (N)"], sharded["reduce-scatter (N)"]) == (
        "2.00",
        "1.00",
        "2.00",
    )
    assert reduced["passes"] == local["passes"] == sharded["passes"] == "2"
    assert 7 < float(sharded["all-gather (N)"]) < 8  # four passes, and the root only once in each
    with pytest.raises(SystemExit, match=r"gr local.*all-reduce: counted 2\.0000, but the formula says 1\.0000"):
        scale.compared(cases[1], 2, counts[cases[0]])


@pytest.mark.parametrize("step", ["AdamW", "GR, λ = r", "GR, λ = 0.8 r", "GR, `momentum`"])
def test_a_step_holds_what_the_formula_says(step, modules):
    """GR: one copy of the weights more than AdamW. And the arrays that the predictions take it to move."""
    scale = modules.scale
    flags, peak, arrays = scale.STEPS[step]
    model = scale.llama("1 M")
    counted = scale.last_step(model, **flags)
    peak.require(step, model, counted.peak)
    assert counted.moved / sum(map(modules.step_counter.bytes_of, model.parameters())) == pytest.approx(
        arrays, abs=0.05
    )
    with pytest.raises(SystemExit, match="counted"):
        peak._replace(weights=peak.weights + 1).require(step, model, counted.peak)


def test_timed_steps_take_their_passes(modules, monkeypatch):
    """In their second round: the first has no momentum to follow."""
    passes = {}

    def count(kinds, rounds):
        for kind, step in kinds.items():
            step()
            passes[kind] = 0

            def see(module, _, kind=kind):
                passes[kind] += isinstance(module, LlamaForCausalLM)

            hook = register_module_forward_pre_hook(see)
            step()
            hook.remove()
        return {kind: [1.0] for kind in kinds}

    monkeypatch.setattr(modules.scale, "interleave", count)
    assert next(modules.scale.time())["AdamW"] == "1.000 s"
    assert passes == {"adamw": 1, "gr global": 2, "gr momentum": 1}


def test_predictions_move_the_arrays_that_were_counted(modules):
    """Those of a GPU's code; one more checks for overflows. The whole step on a CPU moves 2 fewer."""
    names = {"adamw": "AdamW", "gr global": "GR, λ = r", "gr momentum": "GR, `momentum`"}
    for name, step in names.items():
        method, ascent = modules.cost_model.METHODS[name], modules.scale.STEPS_WITHOUT_MEMORY[step][1]
        _, arrays = modules.scale.without_memory(modules.scale.llama("1 M", "meta"), "adamw", ascent)
        assert method.arrays + method.each == pytest.approx(arrays + 1 if ascent else 0, abs=0.01)
        on_cpu = modules.cost_model.ADAMW_ARRAYS + method.arrays + method.each - (2 if ascent else 0)
        assert on_cpu == modules.scale.STEPS[step][2]
        assert 4 + method.copies == modules.scale.STEPS[step][1].weights


def test_a_ring_by_hand(modules):
    Traffic = modules.cost_model.Traffic
    assert Traffic(reduced=8.0).sent(2) == 8.0 and Traffic(reduced=8.0).sent(4) == 12.0
    assert Traffic(gathered=8.0, scattered=4.0).sent(4) == 9.0
    run = modules.cost_model.Run(parameters=10.0, root=4.0, sharded=True, accumulation=3)
    assert run.traffic(modules.cost_model.METHODS["gr global"]) == Traffic()
    assert replace(run, processes=2).traffic(modules.cost_model.METHODS["gr global"]) == Traffic(0.0, 384.0, 80.0)


def test_seconds_by_hand(modules):
    """N = 1: a pass over a token takes 2 s forward and 4 s backward; 4 bytes are reduced in 3 s by 4 processes."""
    Run, METHODS = modules.cost_model.Run, modules.cost_model.METHODS
    rates = modules.cost_model.Rates(flops=1.0, memory=1e12, network=2.0)
    ddp = Run(parameters=1.0, tokens=1.0, processes=4)

    def seconds(run, step="gr global"):
        return pytest.approx(run.seconds(METHODS[step], rates))

    assert seconds(ddp) == 12 and seconds(ddp, "gr local") == 12 and seconds(ddp, "adamw") == 6  # all of it is hidden
    serial = replace(ddp, overlap=0.0)
    assert seconds(serial) == 18 and seconds(serial, "gr local") == 15 and seconds(serial, "adamw") == 9
    assert seconds(replace(serial, accumulation=2)) == 18  # as many tokens, reduced as often
    assert seconds(serial, "admire") == 9 * 1.1
    # Two gathers and a reduce-scatter of 1.5 s each; with two micro-batches, two gathers more.
    sharded = replace(serial, sharded=True)
    assert seconds(sharded, "adamw") == 10.5 and seconds(sharded) == 21
    assert seconds(replace(sharded, accumulation=2)) == 27
    assert seconds(replace(sharded, root=1.0)) == 18


def test_global_costs_twice_a_plain_step_on_any_number_of_processes(modules):
    Run, METHODS = modules.cost_model.Run, modules.cost_model.METHODS
    rates = modules.cost_model.Rates(flops=3e14, memory=3e12, network=5e10)
    for processes in (1, 8, 1024):
        for sharded in (False, True):
            for overlap in (0.0, 1.0):
                run = Run(1e9, 4096, processes, sharded, overlap=overlap, layers=16)
                plain, gr = (run.seconds(METHODS[step], rates) for step in ("adamw", "gr global"))
                assert 1.95 * plain < gr < 2.04 * plain and plain < run.seconds(METHODS["gr momentum"], rates)


def test_memory_by_hand(modules):
    Run, METHODS = modules.cost_model.Run, modules.cost_model.METHODS
    gr = METHODS["gr global"]
    assert Run(parameters=10.0).memory(METHODS["adamw"]) == 160 and Run(parameters=10.0).memory(gr) == 200
    assert Run(parameters=10.0, processes=2).memory(gr) == 240  # buckets
    sharded = Run(parameters=10.0, processes=2, sharded=True, root=2.0, layers=4)
    assert sharded.memory(gr) == 100 + 8 + 16
    assert replace(sharded, accumulation=2).memory(gr) == 100 + 8 + 16 + 40


def test_predict_prints_every_step_that_the_sharding_supports(modules, monkeypatch, capsys):
    for flags, count in (([], 6), (["--fsdp"], 4)):
        monkeypatch.setattr(sys, "argv", ["scale.py", "predict", "--processes", "1024", *flags])
        modules.scale.main()
        assert len(capsys.readouterr().out.splitlines()) == 2 + count


def test_the_guide_has_the_table_of_the_formulas(modules):
    table = modules.scale.as_table([*modules.scale.outlook()])
    page = (ROOT / "docs" / "guides" / "scale.md").read_text(encoding="utf-8")
    assert table in page, "run `python benchmarks/scale.py outlook`, and put the table into docs/guides/scale.md"


def test_communication_is_hidden_from_as_many_tokens_as_the_guide_says(modules):
    """On many processes, with DDP and FSDP2, whatever the size of the model; with half as many tokens it is not."""
    plain, rates = modules.cost_model.METHODS["adamw"], modules.scale.H100._replace(memory=math.inf)
    enough = rates.hiding_tokens
    assert f"{enough:.0f}" == "1538"
    for parameters in (1e8, 1e10):
        for sharded, slower in ((False, 5 / 3), (True, 2)):
            for tokens, factor in ((enough, 1), (enough / 2, slower)):
                run = modules.cost_model.Run(parameters, tokens, 10**6, sharded)
                alone = replace(run, processes=1).seconds(plain, rates)
                assert run.seconds(plain, rates) == pytest.approx(factor * alone, rel=1e-5)
