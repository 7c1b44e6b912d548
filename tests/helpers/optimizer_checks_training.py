"""Checks of `optimizer_contract`: that it trains, whatever parameters and gradients look like."""

import copy
import math
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from helpers.optimizer_contract import Make, check, draw, is_refused, moved, parameters, same, step, values

# ---- Training ----


def descend(make: Make, weight: Tensor, bias: Tensor, schedulers: Iterable[Callable] = (), separate=False) -> None:
    """The loss of a linear layer falls."""
    x = draw(7, weight[0].numel())
    optimizer = make([{"params": [weight]}, {"params": [bias]}] if separate else [weight, bias])
    made = [scheduler(optimizer) for scheduler in schedulers]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (weight.flatten(1) @ x + bias).square().sum()
        value.backward()
        return value

    first = loss().item()
    for _ in range(20):
        value = optimizer.step(loss)
        for scheduler in made:
            scheduler.step(*([value.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert loss().item() < first


@check("the loss falls")
def _(make):
    descend(make, *parameters((6, 4), (6,)))


@check("the loss falls, non-contiguous parameters")
def _(make):
    descend(make, Parameter(draw(0, 6, 4, 2)[..., 0]), Parameter(draw(1, 6, 2)[..., 0]))


@check("the loss falls, channels_last")
def _(make):
    descend(make, Parameter(draw(0, 6, 4, 3, 3).to(memory_format=torch.channels_last)), Parameter(draw(1, 6)))


@check("the loss falls, one group for each parameter")
def _(make):
    descend(make, *parameters(), separate=True)


for _name, _schedulers in {
    "StepLR": [lambda o: lr_scheduler.StepLR(o, 5, 0.9)],
    "LinearLR and StepLR": [lambda o: lr_scheduler.LinearLR(o, 0.4), lambda o: lr_scheduler.StepLR(o, 5, 0.9)],
    "CosineAnnealingLR": [lambda o: lr_scheduler.CosineAnnealingLR(o, 20)],
    "OneCycleLR": [lambda o: lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], 30, cycle_momentum=False)],
    "ReduceLROnPlateau": [lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0)],
    "LambdaLR": [lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))],
}.items():
    check(f"the loss falls, {_name}")(lambda make, given=_schedulers: descend(make, *parameters(), given))


@check("a closure runs once, with gradients on, and its loss is returned")
def _(make):
    params, calls = parameters(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        for p in params:
            p.grad = torch.ones_like(p)
        return 7.0

    assert make(params).step(closure) == 7.0
    assert calls == [True]


@check("a step without closure returns None, and leaves gradients on")
def _(make):
    params = parameters()
    optimizer = make(params)
    for p in params:
        p.grad = torch.ones_like(p)
    assert optimizer.step() is None
    assert torch.is_grad_enabled() and all(p.requires_grad for p in params)


@check("it is a torch.optim.Optimizer, and can be printed")
def _(make):
    optimizer = make(parameters())
    assert isinstance(optimizer, Optimizer) and "lr" in repr(optimizer)


# ---- Gradients ----


@check("nothing moves without gradients")
def _(make):
    before = values(params := parameters())
    make(params).step()
    assert not any(moved(params, before))


@check("nothing moves with zero gradients and no decay")
def _(make):
    before = values(params := parameters())
    optimizer = make(params, weight_decay=0.0)
    for _ in range(3):
        step(optimizer, params, 1, scale=0.0)
    assert not any(moved(params, before))


@check("a parameter without gradient stays, and gets no state")
def _(make):
    params = parameters((6, 4), (6,), (3, 3))
    before = values(params)
    optimizer = make(params)
    step(optimizer, params[:2], 1, 2)
    assert moved(params, before) == [True, True, False]
    assert params[2] not in optimizer.state or not optimizer.state[params[2]]


@check("a gradient that appears late finds a new optimizer's state")
def _(make):
    params, alone = parameters((6, 4), (3, 3)), Parameter(draw(1, 3, 3))
    optimizer, new = make(params), make([alone])
    step(optimizer, params[:1], 1, 2, 3)
    for seed in (4, 5):
        params[0].grad = params[1].grad = None
        step(optimizer, params[1:], seed)
        step(new, [alone], seed)
    same([params[1]], [alone])


@check("a frozen parameter stays")
def _(make):
    params = [*parameters(), frozen := Parameter(draw(5, 2, 2), requires_grad=False)]
    before = frozen.clone()
    step(make(params), params[:2], 1)
    same([frozen], [before])


@check("gradients are left as they are")
def _(make):
    params = parameters()
    optimizer = make(params)
    for seed in (1, 2):
        step(optimizer, params, seed)
        same([p.grad for p in params], [draw(1000 * seed + i, *p.shape) for i, p in enumerate(params)])


@check("no parameter's memory is replaced")
def _(make):
    params = parameters()
    before = [p.data_ptr() for p in params]
    step(make(params), params, 1, 2, 3)
    assert before == [p.data_ptr() for p in params]


@check("a gradient in another layout is read in its order")
def _(make):
    first, second = parameters((6, 4)), parameters((6, 4))
    optimizers = make(first), make(second)
    for seed in (1, 2):
        first[0].grad = draw(seed, 6, 4)
        second[0].grad = draw(seed, 6, 4).T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    same(first, second, 1e-6)


@check("an expanded gradient is read as what it shows")
def _(make):
    first, second = parameters((6, 4)), parameters((6, 4))
    first[0].grad, second[0].grad = torch.ones(1, 1).expand(6, 4), torch.ones(6, 4)
    make(first).step()
    make(second).step()
    same(first, second, 1e-6)


@check("sparse gradients: dense in effect, or RuntimeError")
def _(make):
    first, second = parameters((6, 4)), parameters((6, 4))
    dense = torch.zeros(6, 4)
    dense[2] = 1.0
    first[0].grad, second[0].grad = dense.to_sparse(), dense
    if is_refused(RuntimeError, make(first).step, "sparse"):
        return
    make(second).step()
    same(first, second, 1e-6)


@check("gradients of 1e25 leave finite weights")
def _(make):
    params = parameters()
    step(make(params), params, 1, 2, scale=1e25)
    assert all(p.isfinite().all() for p in params)


# ---- Shapes, layouts, types ----


@check("zero-size parameters")
def _(make):
    params = parameters((0,), (0, 3), (4, 3))
    before = values(params)
    step(make(params), params, 1, 2)
    assert moved(params, before) == [False, False, True] and params[2].isfinite().all()


@check("0-dim parameters")
def _(make):
    params = parameters((), (4, 3))
    before = values(params)
    step(make(params), params, 1, 2)
    assert all(moved(params, before)) and all(p.isfinite().all() for p in params)


@check("non-contiguous is as contiguous")
def _(make):
    first = [Parameter(draw(0, 6, 4, 2)[..., 0]), Parameter(draw(1, 6, 2)[..., 0])]
    second = [Parameter(p.detach().contiguous()) for p in first]
    step(make(first), first, 1, 2, 3)
    step(make(second), second, 1, 2, 3)
    same(first, second, 1e-6)


@check("channels_last is as contiguous, and stays")
def _(make):
    first, second = (
        [Parameter(draw(0, 6, 4, 3, 3).to(memory_format=layout))]
        for layout in (torch.channels_last, torch.contiguous_format)
    )
    step(make(first), first, 1, 2, 3)
    step(make(second), second, 1, 2, 3)
    same(first, second, 1e-6)
    assert first[0].is_contiguous(memory_format=torch.channels_last)


@check("float64 is as float32, and better")
def _(make):
    first, second = parameters(dtype=torch.float64), parameters()
    step(make(first), first, 1, 2, 3)
    step(make(second), second, 1, 2, 3)
    assert all(p.dtype == torch.float64 for p in first)
    same(first, second, 1e-5)


@check("float32 and float64 parameters in one group")
def _(make):
    mixed = [parameters()[0], Parameter(draw(1, 6, dtype=torch.float64))]
    plain = parameters()
    step(make(mixed), mixed, 1, 2)
    step(make(plain), plain, 1, 2)
    same(mixed, plain, 1e-5)


def in_half_precision(make: Make, dtype: torch.dtype) -> None:
    """Gradients whose squares are below what fp16 has: the path is that of float32, or ValueError."""
    half = [Parameter(draw(0, 6, 4).to(dtype))]
    if is_refused(ValueError, lambda: make(half), str(dtype)):
        return
    optimizer = make(half, weight_decay=0.0)
    single = [Parameter(half[0].detach().float())]
    reference = make(single, weight_decay=0.0)
    for seed in (1, 2, 3):
        for p in (half[0], single[0]):
            p.grad = (1e-4 * draw(seed, 6, 4)).to(dtype).to(p.dtype)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(half[0].float(), single[0], rtol=0.02, atol=0.02)  # some roundings of 8 bits


@check("float16 follows float32, or is refused")
def _(make):
    in_half_precision(make, torch.float16)


@check("bfloat16 follows float32, or is refused")
def _(make):
    in_half_precision(make, torch.bfloat16)


@check("complex is as its real view, or refused")
def _(make):
    first = Parameter(torch.view_as_complex(draw(0, 6, 4, 2)))
    second = Parameter(draw(0, 6, 4, 2))
    first.grad = torch.view_as_complex(draw(1, 6, 4, 2))
    second.grad = draw(1, 6, 4, 2)
    if is_refused((ValueError, RuntimeError), lambda: make([first]).step(), "complex|floating point"):
        return
    make([second]).step()
    same([torch.view_as_real(first.detach())], [second], 1e-6)


# ---- In a training loop ----


@check("GradScaler steps with the unscaled gradient, and skips an overflow")
def _(make):
    first, second = parameters(), parameters()
    scaled, plain = make(first), make(second)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = draw(7, 4)
    for optimizer, (weight, bias) in ((scaled, first), (plain, second)):
        loss = (weight @ x + bias).square().sum()
        (scaler.scale(loss) if optimizer is scaled else loss).backward()
    scaler.step(scaled)
    scaler.update()
    plain.step()
    same(first, second, 1e-6)
    before = values(first)
    scaler.scale((first[0] * math.inf).sum()).backward()
    scaler.step(scaled)
    scaler.update()
    assert not any(moved(first, before)) and scaler.get_scale() == 4.0


@check("accelerate prepares it, its scheduler, and its state")
def _(make):
    model = nn.Linear(4, 6)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, make(model.parameters()))
    scheduler = accelerator.prepare(lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4))
    before = values(model.parameters())
    accelerator.backward(model(draw(0, 2, 4)).square().sum())
    optimizer.step()
    scheduler.step()
    assert all(moved(model.parameters(), before))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@check("clipped gradients are those that it steps with")
def _(make):
    params = parameters()
    before = values(params)
    optimizer = make(params)
    for p in params:
        p.grad = torch.full_like(p, 1e6)
    nn.utils.clip_grad_norm_(params, 0.0)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert all((p - b).norm() <= 0.1 * b.norm() for p, b in zip(params, before, strict=True))


@check("two trainings are the same, bit for bit")
def _(make):
    runs = []
    for _ in range(2):
        params = parameters((6, 4), (6,), (3, 3, 2))
        step(make(params), params, 1, 2, 3)
        runs.append(params)
    same(*runs)
