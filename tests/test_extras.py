"""What the dependencies of pyproject.toml alone are enough for, and what says which extra is missing."""

import subprocess
import sys

from helpers import EXTRAS, SCRIPTS

CORE_ALONE = """
import runpy, sys, tempfile

for name in sys.argv[2:]:
    sys.modules[name] = None  # as if it were not installed

import torch
from helpers import toys
from hf_gr import GRConfig, GRTrainer

def trainer(folder, **kwargs):
    torch.manual_seed(0)
    args = GRConfig(**toys.arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, gr_warmup="none",
                    ire_kappa=1.0, ire_gamma=0.5, ire_start_step=1, **kwargs))
    return GRTrainer(toys.llama(), args, train_dataset=toys.text(), eval_dataset=toys.text(4))

folder = tempfile.mkdtemp()
whole = trainer(folder)
whole.train()
whole.save_model()
whole.evaluate()
resumed = trainer(folder)
resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
del sys.argv[2:]
for entry in (
    whole.create_model_card,
    lambda: trainer(folder, layer_statistics_steps=1),
    lambda: runpy.run_module("hf_gr.reporting.plots"),
    lambda: runpy.run_module("hf_gr.data.text"),
    lambda: runpy.run_path(sys.argv[1] + "/train_vit.py"),
    lambda: runpy.run_path(sys.argv[1] + "/finetune_llama_lora.py"),
    lambda: runpy.run_path(sys.argv[1] + "/pretrain_barlow_twins.py"),
    lambda: runpy.run_path(sys.argv[1] + "/evaluate_llama.py"),
    lambda: runpy.run_path(sys.argv[1] + "/evaluate_robustness.py"),
    lambda: runpy.run_path(sys.argv[1] + "/evaluate_sharpness.py"),
    lambda: runpy.run_path(sys.argv[1] + "/evaluate_features.py"),
    lambda: runpy.run_path(sys.argv[1] + "/evaluate_forgetting.py"),
    lambda: runpy.run_path(sys.argv[1] + "/compare.py"),
):
    try:
        entry()
    except ModuleNotFoundError as error:
        print("error:", error)
    else:
        print("error: none")
"""


def test_training_needs_no_extra_and_what_does_names_it():
    command = [sys.executable, "-c", CORE_ALONE, str(SCRIPTS), *sorted(EXTRAS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    named = [line.rpartition("pip install ")[2] for line in done.stdout.splitlines() if line.startswith("error:")]
    assert named == ["'hf_gr[report]'"] * 3 + ["'hf_gr[scripts]'"] * 10, done.stdout
