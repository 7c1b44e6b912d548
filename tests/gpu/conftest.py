"""Each test here runs on the CPU, in the default suite, and, with `-m gpu` or `-m mps`, on a GPU."""

import pytest
import torch

from helpers.devices import AVAILABLE


def _on(device: str, mark: pytest.MarkDecorator):
    return pytest.param(device, marks=[mark, pytest.mark.filterwarnings("default")])  # libraries' warnings of a GPU


@pytest.fixture(params=["cpu", _on("cuda", pytest.mark.gpu), _on("mps", pytest.mark.mps)])
def device(request) -> str:
    return request.param


def pytest_runtest_setup(item):
    """Skips here, where the report has one line for all tests of a device."""
    name = item.callspec.params.get("device", "cpu") if hasattr(item, "callspec") else "cpu"
    if not AVAILABLE[name]():
        pytest.skip(f"no {name} device for the tests, see CONTRIBUTING.md")


@pytest.fixture(autouse=True)
def exact_products():
    """In float32 and not in TF32, which some flags turn on for the whole process."""
    if hasattr(torch.backends, "fp32_precision"):  # torch 2.9
        torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
