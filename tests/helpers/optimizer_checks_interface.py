"""Checks of `optimizer_contract`: groups, arguments, states, copies and hooks."""

import contextlib
import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from helpers.optimizer_contract import Make, check, draw, moved, parameters, refuses, same, step, values

#: Settings that change no result, or that torch has added to its optimizers over the years.
ADDED_LATER = ("foreach", "fused", "maximize", "capturable", "differentiable")


# ---- Groups and arguments ----


@check("groups are as optimizers of their own")
def _(make):
    first, second = parameters(), parameters()
    rate = make(parameters()).param_groups[0]["lr"]
    step(make([{"params": first[:1]}, {"params": first[1:], "lr": rate / 2}]), first, 1, 2)
    optimizers = make(second[:1]), make(second[1:], lr=rate / 2)
    for seed in (1, 2):
        for i, p in enumerate(second):
            p.grad = draw(1000 * seed + i, *p.shape)
        for optimizer in optimizers:
            optimizer.step()
    same(first, second, 1e-6)


@check("a learning rate that is set in a group holds")
def _(make):
    params = parameters()
    optimizer = make(params, weight_decay=0.0)
    step(optimizer, params, 1)
    before = values(params)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, params, 2)
    assert not any(moved(params, before))


@check("add_param_group takes the defaults, and the group trains")
def _(make):
    params = parameters()
    optimizer = make(params[:1])
    optimizer.add_param_group({"params": params[1:]})
    before = values(params)
    step(optimizer, params, 1)
    assert all(moved(params, before))
    keys = [group.keys() - {"params"} for group in optimizer.param_groups]
    assert keys[0] == keys[1]


@check("the parameters in the groups are those that were given")
def _(make):
    params = parameters()
    held = [p for group in make(iter(params)).param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(params, held, strict=True))


@check("named parameters are taken, and their names saved")
def _(make):
    params = parameters()
    optimizer = make([("weight", params[0]), ("bias", params[1])])
    before = values(params)
    step(optimizer, params, 1)
    assert all(moved(params, before))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@check("no parameters: ValueError")
def _(make):
    refuses(ValueError, lambda: make([]), "empty")


@check("a set of parameters, or one that is no tensor: TypeError")
def _(make):
    refuses(TypeError, lambda: make([{"params": set(parameters())}]))
    refuses(TypeError, lambda: make([3.0]))


@check("a tensor that is no leaf: ValueError")
def _(make):
    refuses(ValueError, lambda: make([parameters()[0] * 2]), "leaf")


@check("a parameter in two groups: ValueError")
def _(make):
    (p,) = parameters((3, 3))
    refuses(ValueError, lambda: make([{"params": [p]}, {"params": [p]}]), "more than one")


@check("a parameter twice in a group: a warning")
def _(make):
    (p,) = parameters((3, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make([p, p])
    assert any("duplicate" in str(w.message) for w in caught)


for _key, _value in (("lr", -1.0), ("lr", math.nan), ("weight_decay", -0.1), ("weight_decay", math.nan)):
    check(f"{_key}={_value}: ValueError")(
        lambda make, given=(_key, _value): refuses(ValueError, lambda: make(parameters(), **dict([given])))
    )


def with_tensor_lr(make: Make, shape: tuple[int, ...]) -> None:
    first, second = parameters(), parameters()
    rate = make(parameters()).param_groups[0]["lr"]
    tensor = make(first, lr=torch.full(shape, rate))
    number = make(second, lr=rate)
    for seed in (1, 2):
        step(tensor, first, seed)
        step(number, second, seed)
    same(first, second, 1e-6)


@check("a tensor as learning rate is as the number")
def _(make):
    with_tensor_lr(make, ())


@check("a tensor of shape (1,) as learning rate")
def _(make):
    with_tensor_lr(make, (1,))


@check("a scheduler on a tensor as learning rate")
def _(make):
    params = parameters()
    optimizer = make(params, lr=torch.tensor(0.5), weight_decay=0.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: float(t == 0))
    step(optimizer, params, 1)
    scheduler.step()
    before = values(params)
    step(optimizer, params, 2)
    assert not any(moved(params, before))


# ---- Saving and loading ----


def resumed(make: Make, params: list[Parameter], state: dict) -> tuple[Optimizer, list[Parameter]]:
    copies = [Parameter(p.detach().clone()) for p in params]
    optimizer = make(copies)
    optimizer.load_state_dict(state)
    return optimizer, copies


def goes_on(make: Make, change: Callable[[dict], dict]) -> None:
    """Bit for bit, after the state has been saved, changed and loaded."""
    params = parameters()
    optimizer = make(params)
    step(optimizer, params, 1, 2, 3)
    second, copies = resumed(make, params, change(optimizer.state_dict()))
    step(optimizer, params, 4, 5)
    step(second, copies, 4, 5)
    same(params, copies)


@check("it goes on bitwise from its state")
def _(make):
    goes_on(make, copy.deepcopy)


@check("it goes on bitwise from a file, weights_only")
def _(make):
    def through_a_file(state: dict) -> dict:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        return torch.load(file, weights_only=True)

    goes_on(make, through_a_file)


@check("it goes on bitwise from a state with steps as numbers")
def _(make):
    def as_numbers(state: dict) -> dict:
        state = copy.deepcopy(state)
        for each in state["state"].values():
            if isinstance(each.get("step"), Tensor):
                each["step"] = each["step"].item()
        return state

    goes_on(make, as_numbers)


@check("it goes on from a state of an older version")
def _(make):
    def older(state: dict) -> dict:
        state = copy.deepcopy(state)
        for group in state["param_groups"]:
            for key in ADDED_LATER:
                group.pop(key, None)
        return state

    params = parameters()
    optimizer = make(params)
    step(optimizer, params, 1, 2)
    second, copies = resumed(make, params, older(optimizer.state_dict()))
    step(optimizer, params, 3)
    step(second, copies, 3)
    same(params, copies, 1e-6)


@check("it goes on from a state with names in one that has none, and the other way round")
def _(make):
    for before, after in ((True, False), (False, True)):
        params = parameters()
        optimizer = make(list(zip("ab", params, strict=True)) if before else params)
        step(optimizer, params, 1)
        copies = [Parameter(p.detach().clone()) for p in params]
        second = make(list(zip("ab", copies, strict=True)) if after else copies)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(optimizer, params, 2)
        step(second, copies, 2)
        same(params, copies)


@check("the state of float32 parameters loads for those in float64")
def _(make):
    params = parameters()
    optimizer = make(params)
    step(optimizer, params, 1)
    second, copies = resumed(make, [p.double() for p in params], copy.deepcopy(optimizer.state_dict()))
    step(optimizer, params, 2)
    step(second, copies, 2)
    same(copies, params, 1e-5)


@check("the state that is loaded is not changed")
def _(make):
    params = parameters()
    optimizer = make(params)
    step(optimizer, params, 1)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    resumed(make, params, state)
    torch.testing.assert_close(state["state"], kept["state"], rtol=0, atol=0)
    assert state["param_groups"] == kept["param_groups"]


@check("equal optimizers have equal states")
def _(make):
    states = []
    for _ in range(2):
        params = parameters()
        optimizer = make(params)
        step(optimizer, params, 1, 2)
        states.append(optimizer.state_dict())
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    assert states[0]["param_groups"] == states[1]["param_groups"]


@check("another number of groups, or of parameters: ValueError")
def _(make):
    params = parameters()
    state = make(params).state_dict()
    refuses(ValueError, lambda: make([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(state))
    refuses(ValueError, lambda: make(params[:1]).load_state_dict(state))


@check("the state of another optimizer loads, or is an error when it is loaded")
def _(make):
    for other in (lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), torch.optim.Adagrad, torch.optim.Adam):
        params = parameters()
        foreign = other(params)
        step(foreign, params, 1)
        optimizer = make(copies := parameters())
        with contextlib.suppress(ValueError):
            optimizer.load_state_dict(copy.deepcopy(foreign.state_dict()))
        step(optimizer, copies, 2)  # either way it can go on


@check("a deepcopy goes on bitwise, with all public attributes")
def _(make):
    params = parameters()
    optimizer = make(params)
    step(optimizer, params, 1, 2)
    twin_params, twin = copy.deepcopy((params, optimizer))
    assert {k for k in vars(twin) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    step(optimizer, params, 3)
    step(twin, twin_params, 3)
    same(params, twin_params)


@check("what is pickled goes on bitwise")
def _(make):
    params = parameters()
    optimizer = make(params)
    step(optimizer, params, 1, 2)
    twin_params, twin = pickle.loads(pickle.dumps((params, optimizer)))
    step(optimizer, params, 3)
    step(twin, twin_params, 3)
    same(params, twin_params)


@check("zero_grad sets gradients to None, or to zero")
def _(make):
    params = parameters()
    optimizer = make(params)
    for to_none in (False, True):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.zero_grad(set_to_none=to_none)
        assert all(p.grad is None if to_none else not p.grad.any() for p in params)


# ---- Hooks ----


@check("hooks around a step run once each, in order")
def _(make):
    params, calls = parameters(), []
    make(parameters())  # torch wraps `step` once per class
    optimizer = make(params)
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append("all before") if o is optimizer else None),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda o, *_: calls.append("all after") if o is optimizer else None),
    ]
    step(optimizer, params, 1)
    for handle in handles:
        handle.remove()
    step(optimizer, params, 2)
    assert calls == ["all before", "before", "after", "all after"]


@check("a hook before a step may change the gradient")
def _(make):
    before = values(params := parameters())
    optimizer = make(params, weight_decay=0.0)
    optimizer.register_step_pre_hook(lambda *_: [p.grad.zero_() for p in params] and None)
    step(optimizer, params, 1)
    assert not any(moved(params, before))


@check("hooks around state_dict run, and may replace it")
def _(make):
    optimizer, calls = make(parameters()), []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(o is optimizer))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append("note" in state))
    assert optimizer.state_dict()["note"] == 1
    assert calls == [True, True]


@check("hooks around load_state_dict run in order, and may replace it")
def _(make):
    params, calls = parameters(), []
    optimizer = make(params)
    step(optimizer, params, 1)
    rate = optimizer.param_groups[0]["lr"]
    state = copy.deepcopy(optimizer.state_dict())

    def halve(_, state):
        return {**state, "param_groups": [{**g, "lr": rate / 2} for g in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("second"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(state)
    assert calls == ["first", "second", rate / 2] and optimizer.param_groups[0]["lr"] == rate / 2
