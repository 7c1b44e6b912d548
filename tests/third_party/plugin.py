"""A pytest plugin that puts `GRMixin`, with GR and IRE off, in front of `transformers.Trainer` and `Seq2SeqTrainer`.

`HF_GR_SWAP=1` makes it act. `HF_GR_OUTCOMES` is a file to which it appends "OUTCOME<tab>TEST" for each test, and at the
end "swapped<tab>COUNT", how many trainers with the mixin were made: a swap that does not act would compare Trainer with
itself.
"""

import os
import sys

import transformers.trainer
import transformers.trainer_seq2seq

from hf_gr import GRArguments, GRMixin

OFF = GRArguments(gr_lambda=0)
made = 0


class _Off(GRMixin):
    def __init__(self, *args, **kwargs):
        global made
        made += 1
        super().__init__(*args, **kwargs)

    @property
    def gr_args(self):
        return OFF


def pytest_configure(config):
    if os.environ.get("HF_GR_SWAP") != "1":
        return
    originals = (transformers.trainer.Trainer, transformers.trainer_seq2seq.Seq2SeqTrainer)
    for original in originals:
        name = original.__name__
        swapped = type(name, (_Off, original), {"__module__": original.__module__})
        # The package may have been replaced in `sys.modules` since it was first imported: it loads lazily.
        package = sys.modules["transformers"]
        for module in (package, sys.modules[original.__module__]):
            setattr(module, name, swapped)
        assert getattr(package, name) is swapped


def _report(*fields: object) -> None:
    with open(os.environ["HF_GR_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write("\t".join(map(str, fields)) + "\n")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _report(report.outcome, report.nodeid)


def pytest_sessionfinish():
    _report("swapped", made)
