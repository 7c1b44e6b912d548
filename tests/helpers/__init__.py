"""What tests share. Importing it, in this process or in a worker's, sets the environment of all tests."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS, SCRIPTS = ROOT / "tests", ROOT / "scripts"
#: What only extras install. Trainer itself loads some of them where they are installed.
EXTRAS = {"matplotlib", "jinja2", "scipy", "pyarrow", "datasets", "evaluate", "peft", "PIL", "sklearn", "optuna"}

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])  # for workers

import torch
from transformers import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
