import gc
import os

import pytest


def pytest_configure(config):
    """Before anything imports torch: one GPU for `-m gpu`, none for all other tests."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0" if config.option.markexpr.startswith("gpu") else "")


def pytest_collection_finish():
    """Trainer collects garbage after each run. What the imports have left need not be searched each time."""
    gc.freeze()


@pytest.fixture
def recorder():
    from helpers import toys

    return toys.PathRecorder()
