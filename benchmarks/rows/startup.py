"""What it costs to start: imports, and the first step, in processes of their own."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from comparison import Bench, Comparison, Group, Row

ROOT = Path(__file__).parents[2]
FIRST_STEP = """
import tempfile
import torch
from transformers import ViTConfig, ViTForImageClassification
from {module} import {arguments}, {trainer}

shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
model = ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4))
flags = dict(max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
args = {arguments}(tempfile.mkdtemp(), **flags)
{trainer}(model, args, train_dataset=[{{"pixel_values": torch.randn(3, 8, 8), "labels": 0}}] * 8).train()
"""
PROGRAMS = {
    "import hf_gr": "import hf_gr",
    "import transformers": "import transformers",
    "from hf_gr import GRTrainer": "from hf_gr import GRTrainer",
    "from transformers import Trainer": "from transformers import Trainer",
    "first step of GRTrainer": FIRST_STEP.format(module="hf_gr", arguments="GRConfig", trainer="GRTrainer"),
    "first step of Trainer": FIRST_STEP.format(module="transformers", arguments="TrainingArguments", trainer="Trainer"),
    "from hf_gr.optim import IRE": "from hf_gr.optim import IRE",
    "import torch": "import torch",
}


def run(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tempfile.gettempdir(), env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program}\n{done.stderr}")


def bench(tiny: bool, device: str) -> Bench:
    return Bench({name: partial(run, "" if tiny else program) for name, program in PROGRAMS.items()})


ROWS = tuple(
    Row(ours, (theirs,), bar, cpu_only=True)
    for ours, theirs, bar in (
        ("import hf_gr", "import transformers", 1.00),
        ("from hf_gr import GRTrainer", "from transformers import Trainer", None),
        ("first step of GRTrainer", "first step of Trainer", None),
        ("from hf_gr.optim import IRE", "import torch", None),
    )
)
GROUP = Group(
    "Startup",
    "Whole processes, the interpreter's start included. The first step is one of a tiny ViT, from the start of the "
    "process to the end of `train()`.",
    lambda tiny: [Comparison("a new process", ROWS, partial(bench, tiny), 3, uses_threads=False)],
)
