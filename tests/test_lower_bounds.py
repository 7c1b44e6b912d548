"""`make test-lowest` tests what pyproject.toml says."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "scripts", "report", "mnist", "sweep", "tensorboard")


def test_the_lowest_versions_that_are_tested_are_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    tested = [
        *project["dependencies"],
        *(r for name in EXTRAS for r in extras[name]),
    ]
    for requirement in (r for r in map(Requirement, tested) if r.name != "hf_gr"):
        bound = next(s.version for s in requirement.specifier if s.operator == ">=")
        pin = Requirement(f"x=={pins[requirement.name.replace('_', '-')]}").specifier
        assert pin.contains(bound), f"{requirement}: tested with {pin}"
