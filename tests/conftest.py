import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from transformers import TrainerCallback, logging

torch.set_num_threads(1)
logging.disable_progress_bar()


class PathRecorder(TrainerCallback):
    """Keeps the weights, as one flat vector, before the first step and after each."""

    def __init__(self):
        self.path = []

    def _record(self, model):
        self.path.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone())

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._record(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._record(model)


@pytest.fixture
def recorder():
    return PathRecorder()
