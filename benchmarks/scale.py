"""What a step costs as the model, the number of processes, the accumulation and the sequences grow.

    python benchmarks/scale.py memory traffic    # counted: the load of the machine does not matter
    python benchmarks/scale.py time              # timed: on idle cores
    python benchmarks/scale.py outlook           # computed
    python benchmarks/scale.py predict --parameters 7e9 --layers 32 --processes 1024 --network_rate 50e9 --fsdp

`memory` counts the live bytes of whole steps of `GRTrainer`, from 1 to 58 million parameters, and of the same update on
tensors without memory (device "meta"), up to 1 billion. `traffic` counts the collectives of DDP and FSDP2 on 1, 2 and 4
gloo processes, and the bytes that the kernel was given to send. Both fail where `cost_model.py` disagrees. `time`
reports ratios of interleaved steps. Each writes `DATE-scale-PART.csv`, and `DATE-scale.md` shows all of that day.
`outlook` prints the table of docs/guides/scale.md, and
`predict` what the formulas say about another run.
"""

import argparse
import copy
import csv
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from cost_model import FLOAT, METHODS, Rates, Run, Traffic, admire
from provenance import ROOT, processor, versions
from step_counter import Counter, Step, bytes_of, count_steps
from timing import interleave, ratio
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, logging

from hf_gr import GRConfig, GRTrainer, create_optimizer
from hf_gr.optim.gradient_regularization import Perturbation, gradient_norm, scale_gradients_

Cells = dict[str, Any]  # heading -> cell

#: (hidden size, intermediate size, layers, vocabulary)
MODELS = {
    "1 M": (128, 352, 4, 1024),
    "6 M": (256, 688, 6, 2048),
    "21 M": (512, 1376, 4, 8192),
    "58 M": (512, 1376, 14, 8192),
    "268 M": (1024, 2752, 16, 32000),
    "1.0 B": (2048, 5504, 18, 32000),
}
REAL = ("1 M", "6 M", "21 M", "58 M")
WITHOUT_MEMORY = ("58 M", "268 M", "1.0 B")
LENGTH = 8  # of the sequences of what is counted: activations are next to nothing beside the weights

PLAIN = {"gr_lambda": 0.0}
TVLARS = {"tv_lambda": 0.1, "delay_steps": 50}
#: Coordinates are chosen in every step.
IRE = PLAIN | {"ire_kappa": 2.0, "ire_start_step": 0, "ire_interval": 1}
FLAGS: dict[str, Cells] = {
    "adamw": PLAIN,
    "gr global": {},
    "gr local": {"gr_scope": "local"},
    "gr micro": {"gr_scope": "micro"},
    "gr momentum": {"gr_ascent": "momentum"},
    "admire": IRE,
    "lars": PLAIN | {"optim": "lars"},
    "tvlars": PLAIN | {"optim": "tvlars", "optim_args": "tv_lambda=0.1,delay_steps=50"},
    "lamb": PLAIN | {"optim": "lamb"},
}


def llama(name: str, device: str = "cpu") -> LlamaForCausalLM:
    hidden, intermediate, layers, vocabulary = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=4,
            )
        )


def batch(rows: int, length: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 1024, (rows, length), device=device)
    return {"input_ids": ids, "labels": ids}


def config(folder: str, **flags: Any) -> GRConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1000}
    return GRConfig(folder, use_cpu=True, gr_warmup="none", lr_scheduler_type="constant", **quiet | flags)


def last_step(model: nn.Module, cls: type[GRTrainer] = GRTrainer, **flags: Any) -> Step:
    """The second of two steps, with one sequence per micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, max_steps=2, per_device_train_batch_size=1, **flags)
        examples = args.max_steps * args.gradient_accumulation_steps * args.world_size
        data = [{key: value[0] for key, value in batch(1, LENGTH).items()} for _ in range(examples)]
        return count_steps(cls(model=model, args=args, train_dataset=data))[-1]


def require_close(case: str, counted: float, formula: float, slack: float) -> None:
    if abs(counted - formula) > slack:
        raise SystemExit(f"error: {case}: counted {counted:.4f}, but the formula says {formula:.4f} +- {slack:.4f}.")


# ---- Memory ----


class Peak(NamedTuple):
    """A formula for the peak of a step: `weights` N + `largest` L + `megabytes`, with N the bytes of the weights and L
    those of the largest of them."""

    weights: float
    largest: float = 0
    megabytes: float = 0

    def __str__(self) -> str:
        terms = [(self.weights, "N"), (self.largest, "L"), (self.megabytes, "MB")]
        return " + ".join(unit if number == 1 else f"{number:g} {unit}" for number, unit in terms if number)

    def require(self, case: str, model: nn.Module, peak: int) -> str:
        """`peak`, which does not count the weights, in units of N."""
        sizes = [bytes_of(p) for p in model.parameters()]
        n, largest = sum(sizes), max(sizes)
        formula = self.weights + (self.largest * largest + 1e6 * self.megabytes) / n
        # Activations; gradients that wait to be added, which differ from model to model; blocks that are not full.
        slack = 0.01 + 0.8 * (largest * (self.largest > 0) + 1e6 * self.megabytes) / n
        require_close(case, 1 + peak / n, formula, slack)
        return f"{1 + peak / n:.2f}"


#: Of `GRTrainer` on a CPU: flags, the peak, and how many arrays of N are read or written outside of the passes. None
#: for IRE, which does part of that in NumPy, where nothing is counted.
STEPS: dict[str, tuple[Cells, Peak, float | None]] = {
    "AdamW": (PLAIN, Peak(4), 10),
    "GR, λ = r": ({}, Peak(5), 19),
    "GR, λ = 0.8 r": ({"gr_lambda": 0.08}, Peak(5, 1), 23),
    "GR, λ = 0.8 r, `gr_clip`": ({"gr_lambda": 0.08, "gr_clip": 1.0}, Peak(6), 29),
    "GR, λ = r, `micro`, accumulation 2": (FLAGS["gr micro"] | {"gradient_accumulation_steps": 2}, Peak(6), 27),
    "GR, `momentum`": (FLAGS["gr momentum"], Peak(5), 19),
    "IRE around a fused AdamW": (IRE, Peak(4.25, 0, 5), None),
    "IRE around another AdamW": (IRE | {"optim": "adamw_torch"}, Peak(5.25, 2, 0.5), None),
    "LARS": (FLAGS["lars"], Peak(3), 12),
    "TVLARS": (FLAGS["tvlars"], Peak(3), 12),
    "LAMB": (FLAGS["lamb"], Peak(4, 1), 18),
}
#: On device "meta": the optimizer, the ascent, lambda/r, and the peak. torch has no fused AdamW there.
STEPS_WITHOUT_MEMORY: dict[str, tuple[str, str | None, float, Peak]] = {
    "AdamW": ("adamw", None, 1, Peak(4, 2)),
    "GR, λ = r": ("adamw", "gradient", 1, Peak(5)),
    "GR, λ = 0.8 r": ("adamw", "gradient", 0.8, Peak(5, 1, 67)),
    "GR, `momentum`": ("adamw", "momentum", 1, Peak(5)),
    "LARS": ("lars", None, 1, Peak(4)),
    "TVLARS": ("tvlars", None, 1, Peak(4)),
    "LAMB": ("lamb", None, 1, Peak(5)),
}


def memory() -> Iterator[Cells]:
    """The peak of a step in which the optimizer has its state."""
    for step, (flags, peak, arrays) in STEPS.items():
        row: Cells = {"step": step, "on": "cpu", "formula": peak}
        for name in REAL:
            counted = last_step(model := llama(name), **flags)
            moved = counted.moved / sum(map(bytes_of, model.parameters()))
            if arrays is not None:
                require_close(f"{step}, {name}: arrays", moved, arrays, slack=0.05)
            row |= {"passes": f"{counted.passes:g}", "arrays": "" if arrays is None else f"{moved:.0f}"}
            row[name] = peak.require(f"{step}, {name}", model, counted.peak)
        yield row
    for step, (optimizer, ascent, degree, peak) in STEPS_WITHOUT_MEMORY.items():
        row = {"step": step, "on": "meta", "formula": peak, "passes": "2" if ascent == "gradient" else "1"}
        for name in WITHOUT_MEMORY:
            model = llama(name, "meta")
            highest, arrays = without_memory(model, optimizer, ascent, degree)
            row |= {"arrays": f"{arrays:.0f}" if ascent else ""}
            row[name] = peak.require(f"{step}, {name}, meta", model, highest)
        yield row


def without_memory(
    model: nn.Module, optimizer: str, ascent: str | None = None, degree: float = 1.0
) -> tuple[int, float]:
    """Of the update of `GRTrainer` with r = 1, on tensors without values: the peak of the second step, and the arrays
    of N that GR alone reads or writes."""
    params, inputs = list(model.parameters()), batch(1, LENGTH, "meta")
    if optimizer == "adamw":
        stepper: torch.optim.Optimizer = torch.optim.AdamW(params)
    else:
        stepper = create_optimizer(optimizer, params, lr=1.0, **TVLARS if optimizer == "tvlars" else {})
    counter = Counter(params)
    one_pass = counter.without_moving(lambda: model(**inputs).loss.backward())
    with counter:
        for kind in (None, ascent):
            counter.restart()
            if kind == "gradient":
                one_pass()
            if kind is not None:
                norm = gradient_norm(params) if kind == "gradient" else math.nan
                perturbation = Perturbation(params, kind, stepper)
                perturbation.apply(1.0, norm, (1 - degree) / degree)
            one_pass()
            if kind is not None:
                perturbation.restore()
                scale_gradients_(params, degree)
            moved = counter.moved
            stepper.step()
            stepper.zero_grad()
    return counter.peak, moved / sum(map(bytes_of, params))


# ---- Traffic ----

#: Collectives of at most this many bytes are norms, counts, buffers, and DDP's flags of the parameters in use.
SMALL = 4096
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
MODEL = "1 M"


class Case(NamedTuple):
    sharing: str
    step: str
    accumulation: int


#: What FSDP2 supports. Under DDP, the last three communicate as AdamW does.
SHARINGS = {"DDP": tuple(METHODS), "FSDP2": ("adamw", "gr global", "gr momentum", "admire", "lars", "tvlars", "lamb")}


def cases(processes: int) -> list[Case]:
    sharings = SHARINGS if processes > 1 else ("DDP",)
    return [Case(sharing, step, n) for sharing in sharings for step in SHARINGS[sharing] for n in (1, 4)]


def count_traffic(processes: int, counted: list[Case]) -> dict[Case, Step]:
    """The last step of each case, of the first process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "steps.json")
        command = [sys.executable, *launcher, __file__, "worker", "--file", str(file), "--cases", json.dumps(counted)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise RuntimeError(done.stderr[-5000:])
        return {case: Step.of(step) for case, step in zip(counted, json.loads(file.read_text()), strict=True)}


def worker(file: Path, counted: list[Case]) -> None:
    """Of one process: train each case, and write what the last step of the first process did."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.distributed_worker import Sharded, reset_state

    found = []
    for case in counted:
        flags = FLAGS[case.step] | {"gradient_accumulation_steps": case.accumulation}
        if "RANK" in os.environ:
            flags["ddp_backend"] = "gloo"
        found.append(last_step(llama(MODEL), Sharded if case.sharing == "FSDP2" else GRTrainer, **flags))
        reset_state()
    if os.environ.get("RANK", "0") == "0":
        file.write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # with FSDP, threads of torch may abort the process as it ends: pytorch/pytorch#190489


def traffic() -> Iterator[Cells]:
    """What a step communicates, in units of the weights."""
    counts = {processes: count_traffic(processes, cases(processes)) for processes in (1, 2, 4)}
    for case in cases(2):
        row: Cells = {}
        for processes, steps in counts.items():
            if case in steps:
                row |= compared(case, processes, steps[case])
        yield row


def compared(case: Case, processes: int, step: Step) -> Cells:
    """A row of the table. Exits with an error where the formulas disagree."""
    model = llama(MODEL, "meta")
    n = sum(map(bytes_of, model.parameters()))
    root = sum(map(bytes_of, [*model.lm_head.parameters(), *model.model.norm.parameters()]))
    run = Run(n / FLOAT, 0, processes, case.sharing == "FSDP2", case.accumulation, root / FLOAT)
    method = admire(interval=1) if case.step == "admire" else METHODS.get(case.step, METHODS["adamw"])
    formula = run.traffic(method)
    large = [collective for collective in step.collectives if collective.bytes > SMALL]
    payloads = [sum(collective.bytes for collective in large if collective.kind == kind) for kind in KINDS]
    # gloo reduces and scatters by an all-reduce, which sends twice as much.
    sent = Traffic(formula.reduced + formula.scattered, formula.gathered).sent(processes)

    name = f"{case}, {processes} processes"
    require_close(f"{name}: passes", step.passes, method.passes, slack=0)
    for kind, found, expected in zip(KINDS, payloads, formula, strict=True):
        require_close(f"{name}: {kind}", found / n, expected / n, slack=0.001 * expected / n)
    require_close(f"{name}: sent", step.written / n, sent / n, slack=0.005 * sent / n)
    if processes == 1:
        require_close(f"{name}: collectives", len(step.collectives), 0, slack=0)
        return {}
    shared: Cells = dict(zip(("sharing", "step", "micro-batches"), case, strict=True)) | {"passes": f"{step.passes:g}"}
    shared |= {f"{kind} (N)": f"{payload / n:.2f}" for kind, payload in zip(KINDS, payloads, strict=True)}
    shared |= {"collectives": len(large), "small ones": len(step.collectives) - len(large)}
    sending = {f"sent by each of {processes} (N)": f"{step.written / n:.2f}"}
    return shared | sending | {f"ring of {processes} (N)": f"{formula.sent(processes) / n:.2f}"}


# ---- Time ----


def stepper(model: nn.Module, rows: int, length: int, accumulation: int, **flags: Any) -> Callable[[], None]:
    """An optimizer step of a copy of `model`."""
    trainer = GRTrainer(model=copy.deepcopy(model), args=config(tempfile.mkdtemp(), **flags))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = accumulation
    window = [batch(rows, length) for _ in range(accumulation)]

    def step() -> None:
        for i, inputs in enumerate(window):
            trainer.accelerator.gradient_state._set_sync_gradients(i == accumulation - 1)
            trainer.training_step(trainer.model, inputs)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return step


def time() -> Iterator[Cells]:
    """A plain step, and the ratios of others to it: medians and middle halves of 7 rounds."""
    sizes = [(name, 1, 4, 64) for name in ("1 M", "6 M", "21 M")]
    accumulations = [("1 M", accumulation, 4, 64) for accumulation in (2, 4, 8)]
    lengths = [("1 M", 1, 2, length) for length in (32, 128, 512)]
    for name, accumulation, rows, length in [*sizes, *accumulations, *lengths]:
        model = llama(name)
        kinds = {
            step: stepper(model, rows, length, accumulation, **FLAGS[step])
            for step in ("adamw", "gr global", "gr momentum")
        }
        seconds = interleave(kinds, rounds=7)
        yield {
            "parameters": name,
            "micro-batches": accumulation,
            "sequences": rows,
            "length": length,
            "AdamW": f"{statistics.median(seconds['adamw']):.3f} s",
            "GR / AdamW": ratio(seconds, "gr global", "adamw"),
            "`momentum` / AdamW": ratio(seconds, "gr momentum", "adamw"),
        }


# ---- Prediction ----


def predict(run: Run, rates: Rates) -> Iterator[Cells]:
    """What the formulas say of each kind of step."""
    for name, method in METHODS.items():
        if run.sharded and method.passes != method.reductions:  # refused: no process has a gradient of its own
            continue
        row: Cells = {"step": name, "passes": f"{method.passes:g}"}
        for heading, overlap in (("communication overlaps", 1.0), ("does not", 0.0)):
            timed = replace(run, overlap=overlap)
            seconds, plain = (timed.seconds(m, rates) for m in (method, METHODS["adamw"]))
            row[heading] = f"{seconds:.3f} s, {seconds / plain:.2f} times AdamW"
        row["sent"] = f"{run.traffic(method).sent(run.processes) / 1e9:.2f} GB"
        yield row | {"memory, without activations": f"{run.memory(method) / 1e9:.1f} GB"}


#: Of an H100 SXM, as published: 35 % of 989 TFLOP/s (bf16, dense), 3.35 TB/s. Its 900 GB/s of NVLink are 450 in each
#: direction. Between nodes of 8 GPUs, each with a link of 400 Gb/s, a ring uses all 8 links, 400 GB/s; or there is one.
H100 = Rates(flops=0.35 * 989e12, memory=3.35e12, network=450e9)
CLUSTERS = {
    "1": (1, H100),
    "8, NVLink": (8, H100),
    "1,024, 8 links per node": (1024, H100._replace(network=400e9)),
    "1,024, 1 link per node": (1024, H100._replace(network=50e9)),
}


def outlook() -> Iterator[Cells]:
    """The Llama of 1.0 B on GPUs. The ranges are from all communication running beside computation to none."""
    model = llama("1.0 B", "meta")
    size, root = (sum(p.numel() for p in part.parameters()) for part in (model, model.lm_head))
    for gpus, (processes, rates) in CLUSTERS.items():
        for sharing in ("DDP", "FSDP2") if processes > 1 else ("",):
            for tokens in (2_048, 16_384):
                run = Run(size, tokens, processes, sharing == "FSDP2", root=root, layers=MODELS["1.0 B"][2])
                row: Cells = {"GPUs": gpus, "sharing": sharing, "tokens per GPU": f"{tokens:,}"}
                yield row | outlook_of(run, rates)


def outlook_of(run: Run, rates: Rates) -> Cells:
    runs = [replace(run, overlap=overlap) for overlap in (1.0, 0.0)]
    plain = [timed.seconds(METHODS["adamw"], rates) for timed in runs]
    row: Cells = {"AdamW": f"{spread([1e3 * seconds for seconds in plain], 0)} ms"}
    for name, method in METHODS.items():
        if name not in ("adamw", "gr micro"):
            supported = not run.sharded or method.passes == method.reductions
            ratios = [timed.seconds(method, rates) / seconds for timed, seconds in zip(runs, plain, strict=True)]
            row[name.removeprefix("gr ")] = spread(ratios, 2) if supported else "refused"
    row["GB, AdamW"], row["GB, GR"] = (f"{run.memory(METHODS[name]) / 1e9:.1f}" for name in ("adamw", "gr global"))
    return row


def spread(values: list[float], digits: int) -> str:
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in sorted(values))
    return " to ".join(ends)


# ---- Results ----

PARTS: dict[str, tuple[Callable[[], Iterator[Cells]], str]] = {
    "memory": (
        memory,
        """Memory. **Counted:** the peak of live bytes in the second step, in units of N, the bytes of the float32
        weights; L is the size of the largest tensor. Sequences have 8 tokens, so that activations hardly count. `cpu`
        is a whole step of `GRTrainer`, which keeps the memory of GR's copy from step to step on a CPU. `meta` is the
        same update on tensors without memory, where the code of a GPU runs, and AdamW is not fused. `arrays` is how
        many arrays of the size of the weights are read or written outside of the passes in a step that is not logged,
        3 of them by clipping; on `meta`, by GR alone. IRE makes its estimate in every step here, which is its second
        pass. Each peak is within 1 % of N of its formula, and where L or megabytes are part of it, within 0.8 of them:
        the number of gradients that wait to be added varies, and blocks are not full.""",
    ),
    "traffic": (
        traffic,
        """Traffic. **Counted:** the second step of the Llama of 1 M, on gloo processes of one machine, in units
        of N, the bytes of the float32 gradient. Payloads and collectives are what reached c10d. `sent` is what the
        first process gave the kernel to write, whatever it was. Payloads are within 0.1 % of `cost_model.py`, bytes
        sent within 0.5 %. **Computed:** `ring` is what each process of a ring sends, reduce-scatter included; gloo's
        is an all-reduce, which sends twice as much. One process sends nothing (counted). `small ones` are up to 4 KiB:
        norms, counts, buffers, and the flags by which DDP finds unused parameters. `admire` makes its estimate in every
        step here.""",
    ),
    "time": (
        time,
        """Time. **Timed:** whole steps in one process and one thread, interleaved in a new order each round; medians of
        7 paired ratios, the middle half in brackets.""",
    ),
}


def as_table(rows: list[Cells]) -> str:
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([str(row.get(head, "")) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(folder: Path, part: str, rows: list[Cells]) -> None:
    """Write the rows, and the page of all parts of the day."""
    name = f"{date.today()}-scale"
    with (folder / f"{name}-{part}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(head for row in rows for head in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    known = {other: folder / f"{name}-{other}.csv" for other in PARTS}
    known = {other: table for other, table in known.items() if table.exists()}
    command = f"`python benchmarks/scale.py {' '.join(known)}` at the commit of this file: "
    page = [f"# Scale ({date.today()})", textwrap.fill(f"{command}{', '.join(versions())}; {processor('cpu')}.", 120)]
    for other, table in known.items():
        title, _, text = PARTS[other][1].partition(". ")
        with table.open(newline="", encoding="utf-8") as file:
            page += [f"## {title}", textwrap.fill(" ".join(text.split()), 120), as_table([*csv.DictReader(file)])]
    (folder / f"{name}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("parts", nargs="+", choices=[*PARTS, "outlook", "predict", "worker"])
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    run = made.add_argument_group("predict", "Rates are per process; the defaults are for an H100, see scale.md.")
    run.add_argument("--parameters", type=float, default=1e9)
    run.add_argument("--tokens", type=float, default=8192, help="of a process in a step, over all micro-batches")
    run.add_argument("--processes", type=int, default=8)
    run.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    run.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    run.add_argument("--root", type=float, default=0.0, help="parameters outside the wrapped layers (FSDP2)")
    run.add_argument("--layers", type=int, default=16, help="wrapped layers (FSDP2) or buckets (DDP)")
    run.add_argument("--flops", type=float, default=0.35 * 989e12, help="operations per second of a pass")
    run.add_argument("--memory_rate", type=float, default=3.35e12, help="bytes per second")
    run.add_argument("--network_rate", type=float, default=50e9, help="bytes per second that a process sends")
    run.add_argument("--latency", type=float, default=0.0, help="seconds before a collective begins to send")
    for hidden in ("--file", "--cases"):
        made.add_argument(hidden, help=argparse.SUPPRESS)
    return made


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    logging.set_verbosity_error()
    for part in options.parts:
        if part == "worker":
            worker(Path(options.file), [Case(*case) for case in json.loads(options.cases)])
        elif part == "outlook":
            print(as_table([*outlook()]))
        elif part == "predict":
            o = options
            run = Run(o.parameters, o.tokens, o.processes, o.fsdp, o.accumulation, o.root, o.layers)
            print(as_table([*predict(run, Rates(o.flops, o.memory_rate, o.network_rate, o.latency))]))
        else:
            rows = [*PARTS[part][0]()]
            print(as_table(rows), flush=True)
            save(options.output, part, rows)


if __name__ == "__main__":
    main()
