"""What is installed from a wheel, and not from a checkout."""

import shutil
import subprocess
import sys
from zipfile import ZipFile

import pytest

from helpers import ROOT


def test_the_wheel_has_the_whole_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # what pip would fetch to build it
    source = tmp_path / "source"
    shutil.copytree(ROOT / "hf_gr", source / "hf_gr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = {path.relative_to(source).as_posix() for path in (source / "hf_gr").rglob("*") if path.is_file()}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert {name for name in wheel.namelist() if name.startswith("hf_gr/")} == files
    assert files >= {"hf_gr/scripts/recipes/vit_digits.yaml", "hf_gr/scripts/grids/published-gr.csv"}
