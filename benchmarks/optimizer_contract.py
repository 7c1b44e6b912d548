"""What an optimizer of torch promises, checked of ours and of their peers: torch's, timm's, pytorch_optimizer's.

    pip install -c constraints.txt -e ".[bench]" && pip install --no-deps --target outputs/timm timm
    python benchmarks/optimizer_contract.py --timm outputs/timm

The checks are those of `tests/optimizer_contract.py`; the table has a row for each that somebody fails, with the error,
and the count of those that hold. Some are no promise of torch's, and are here because training needs them: half
precision, NaN as a setting, and the state of another optimizer.
"""

import argparse
import contextlib
import io
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytorch_optimizer
import torch
from optimizer_step import timm_optimizers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from optimizer_contract import CHECKS, Make
from test_optimizer_contract import EXCEPT, OURS


def peers(timm: Path) -> dict[str, Make]:
    lars, lamb = timm_optimizers(timm)
    return {
        "torch SGD": lambda ps, lr=0.01, **kw: torch.optim.SGD(ps, lr, momentum=0.9, **kw),
        "torch AdamW": lambda ps, lr=0.01, **kw: torch.optim.AdamW(ps, lr, **kw),
        "torch fused AdamW": lambda ps, lr=0.01, **kw: torch.optim.AdamW(ps, lr, fused=True, **kw),
        # Without weight decay it is plain SGD, and takes the rate of that.
        "timm LARS": lambda ps, lr=0.01, **kw: lars(ps, lr, momentum=0.9, **kw),
        # Clipping by the norm of all parameters would make each depend on the others.
        "timm LAMB": lambda ps, lr=0.01, **kw: lamb(ps, lr, max_grad_norm=None, **kw),
        "p_o LARS": lambda ps, lr=0.5, **kw: pytorch_optimizer.LARS(ps, lr, **kw),
        "p_o LAMB": lambda ps, lr=0.01, **kw: pytorch_optimizer.Lamb(ps, lr, **kw),
        "p_o Lookahead": lambda ps, lr=0.01, **kw: pytorch_optimizer.Lookahead(torch.optim.AdamW(ps, lr, **kw)),
    }


def failure(check: str, make: Make) -> str:
    """The kind of error of a check, or nothing."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            CHECKS[check](make)
        except Exception as error:  # what goes wrong is what is to be found out
            return type(error).__name__
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", type=Path, required=True, help="the folder that timm was installed into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timm_version = next(options.timm.glob("timm-*.dist-info")).name.removeprefix("timm-").removesuffix(".dist-info")
    print(
        f"torch {torch.__version__}, timm {timm_version}, pytorch_optimizer (p_o) {version('pytorch_optimizer')}, "
        f"Python {platform.python_version()}, CPU\n"
    )
    subjects = OURS | peers(options.timm)
    failures = {name: {check: failure(check, make) for check in CHECKS} for name, make in subjects.items()}
    print(f"| check | {' | '.join(subjects)} |")
    print("|---" * (1 + len(subjects)) + "|")
    print(f"| **of {len(CHECKS)} checks hold** |", end="")
    print("".join(f" **{sum(not error for error in failures[name].values())}** |" for name in subjects))
    failed = [check for check in CHECKS if any(failures[name][check] for name in subjects)]
    for check in failed:
        print(f"| {check} | {' | '.join(failures[name][check] or 'ok' for name in subjects)} |")
    print("\nHeld by all: " + "; ".join(check for check in CHECKS if check not in failed) + ".")
    print("\nOurs, why not:\n")
    for check, reasons in EXCEPT.items():
        for name, reason in reasons.items():
            print(f"- {name}, {check}: {reason}.")


if __name__ == "__main__":
    main()
