"""`GRMixin` overrides hooks of `Trainer`, private ones among them: one that is renamed there would silently not act."""

import inspect

import pytest
from accelerate.state import GradientState
from transformers import Trainer, TrainingArguments

from hf_gr import GRMixin, GRTrainer

#: What the mixin adds; everything else that it defines is a hook.
OWN = {"gr_args", "gr_first_pass_only", "gr_second_pass", "ire_optimizer", "ire_sampled_losses", "script_args", "costs",
       "planned_passes", "sharpness", "further_facts"}  # fmt: skip
HOOKS = sorted(name for name in vars(GRMixin).keys() - OWN if not (name.startswith("__") and name != "__init__"))


def test_the_front_door_is_small():
    assert vars(GRMixin).keys() >= OWN
    assert len(HOOKS) + len(OWN) <= 35


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_one_of_trainers(name):
    """And takes what `Trainer` passes to it."""
    theirs, ours = (getattr(cls, name) for cls in (Trainer, GRMixin))
    taken = inspect.signature(ours).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in taken.values()):
        return
    expected = [name for name in inspect.signature(theirs).parameters if name != "self"]
    assert [name for name in taken if name != "self"] == expected


def test_each_hook_is_overridden_once():
    bases = [cls for cls in GRTrainer.__mro__ if cls not in Trainer.__mro__]
    assert [cls.__name__ for cls in bases] == ["GRTrainer", "GRMixin"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GradientState, "_set_sync_gradients"),
        (Trainer, "_prepare_inputs"),
        (Trainer, "_get_output_dir"),
        (TrainingArguments, "get_warmup_steps"),
    ],
    ids=str,
)
def test_what_is_called_is_there(owner, name):
    assert callable(getattr(owner, name))
