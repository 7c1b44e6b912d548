"""What an optimizer of torch promises, checked of ours and of their peers: torch's, timm's, pytorch_optimizer's.

    pip install -c constraints.txt -e ".[bench]" && pip install --no-deps --target outputs/peers timm
    python benchmarks/optimizer_contract.py --peers outputs/peers

The checks are those of `tests/helpers/optimizer_contract.py`. The table has a row for each that somebody fails, with
the error, and the count of those that hold. Some are no promise of torch's, and are here because training needs them:
half precision, NaN as a setting, and the state of another optimizer.
"""

import argparse
import contextlib
import io
import platform
import sys
import warnings
from pathlib import Path

import peers
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "optim"))

from test_optimizer_contract import EXCEPT, OURS

from helpers.optimizer_contract import CHECKS, Make


def groups() -> dict[str, dict[str, Make]]:
    timm, pytorch_optimizer = peers.peer("timm"), peers.peer("pytorch_optimizer")
    lars, lamb = timm.lars.Lars, timm.lamb.Lamb
    return {
        "ours": OURS,
        "torch": {
            "SGD": lambda ps, lr=0.01, **kw: torch.optim.SGD(ps, lr, momentum=0.9, **kw),
            "AdamW": lambda ps, lr=0.01, **kw: torch.optim.AdamW(ps, lr, **kw),
            "fused AdamW": lambda ps, lr=0.01, **kw: torch.optim.AdamW(ps, lr, fused=True, **kw),
        },
        "timm": {
            # Without weight decay it is plain SGD, and takes the rate of that.
            "LARS": lambda ps, lr=0.01, **kw: lars(ps, lr, momentum=0.9, **kw),
            # Clipping by the norm of all parameters would make each depend on the others.
            "LAMB": lambda ps, lr=0.01, **kw: lamb(ps, lr, max_grad_norm=None, **kw),
        },
        "pytorch_optimizer": {
            "LARS": lambda ps, lr=0.5, **kw: pytorch_optimizer.LARS(ps, lr, **kw),
            "LAMB": lambda ps, lr=0.01, **kw: pytorch_optimizer.Lamb(ps, lr, **kw),
            "Lookahead": lambda ps, lr=0.01, **kw: pytorch_optimizer.Lookahead(torch.optim.AdamW(ps, lr, **kw)),
        },
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
    parser.add_argument("--peers", nargs="+", default=[], help="folders with peers that are not installed")
    peers.folders += parser.parse_args().peers
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {', '.join(peers.versions())}, Python {platform.python_version()}, CPU\n")
    failures = {
        group: {name: {check: failure(check, make) for check in CHECKS} for name, make in makers.items()}
        for group, makers in groups().items()
    }
    print(f"| | optimizer | of {len(CHECKS)} checks hold |\n|---|---|---|")
    for group, by_name in failures.items():
        for name, errors in by_name.items():
            print(f"| {group} | {name} | {sum(not error for error in errors.values())} |")
    print(f"\n| fails | {' | '.join(failures)} |")
    print("|---" * (1 + len(failures)) + "|")
    held = []
    for check in CHECKS:
        cells = [
            "<br>".join(f"{name}: {errors[check]}" for name, errors in by_name.items() if errors[check])
            for by_name in failures.values()
        ]
        if any(cells):
            print(f"| {check} | {' | '.join(cells)} |")
        else:
            held.append(check)
    print(f"\nHeld by all {len(held)}: {'; '.join(held)}.")
    print("\nOurs, why not:\n")
    for check, reasons in EXCEPT.items():
        for name, reason in reasons.items():
            print(f"- {name}, {check}: {reason}.")


if __name__ == "__main__":
    main()
