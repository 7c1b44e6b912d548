"""A pytest plugin that puts `GRTrainer`, with GR and IRE off, in the place of `transformers.Trainer`.

`HF_GR_SWAP=1` makes it act; `HF_GR_OUTCOMES` is a file to which it appends a line per test: outcome, tab, name.
"""

import os

import transformers

from hf_gr import GRArguments, GRMixin

OFF = GRArguments(gr_lambda=0)


class _Off(GRMixin):
    @property
    def gr_args(self):
        return OFF


def pytest_configure(config):
    if os.environ.get("HF_GR_SWAP") != "1":
        return
    # Both are loaded before the first is replaced: one is made from the other.
    for name, original in [(name, getattr(transformers, name)) for name in ("Trainer", "Seq2SeqTrainer")]:
        swapped = type(name, (_Off, original), {"__module__": original.__module__})
        for module in (transformers, __import__(original.__module__, fromlist=[name])):
            setattr(module, name, swapped)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        with open(os.environ["HF_GR_OUTCOMES"], "a", encoding="utf-8") as file:
            # A failure of the setup or of what comes after counts, too; the last line of a test wins.
            file.write(f"{report.outcome}\t{report.nodeid}\n")
