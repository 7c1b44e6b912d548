import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from transformers import logging

import toys

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture
def recorder():
    return toys.PathRecorder()
