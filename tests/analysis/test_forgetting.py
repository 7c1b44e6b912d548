"""The frontier of two quadratics against AdamW by hand; the value at the target, and where there is none."""

import math

import pytest
import torch
from torch import nn

from hf_gr.analysis.forgetting import FineTuning, Point, at_target, common_target, forgetting, frontier


class Place(nn.Module):
    """A place in the plane: the losses are half the squared distances to two other places."""

    def __init__(self, start=(0.0, 0.0)):
        super().__init__()
        self.place = nn.Parameter(torch.tensor(start))
        self.dropout = nn.Dropout(0.5)

    def forward(self, other):
        return 0.5 * (self.dropout(self.place) - other).square().sum()


FIRST, SECOND = torch.tensor([0.1, 0.0]), torch.tensor([3.0, 0.0])


def evaluate(model):
    assert not model.training and not torch.is_grad_enabled()
    return model(SECOND).item(), model(FIRST).item()


def loss(model, batch):
    assert model.training
    model.dropout.p = 0.0
    return model(batch)


def points_of(how, model=None, batches=(SECOND,)):
    return list(frontier(model or Place(), loss, batches, evaluate, how))


def test_points_are_those_of_adamw_by_hand():
    how = FineTuning(learning_rate=0.1, weight_decay=0.2, max_grad_norm=0.5, max_steps=7, eval_steps=3)
    place = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([place], lr=0.1, weight_decay=0.2)
    places = [place.detach().clone()]
    others = [SECOND, FIRST, 2 * SECOND]
    for step in range(7):
        (gradient,) = torch.autograd.grad(0.5 * (place - others[step % 3]).square().sum(), place)
        place.grad = gradient * min(1.0, 0.5 / gradient.norm().item())
        optimizer.step()
        places.append(place.detach().clone())
    found = points_of(how, batches=others)
    assert [point.step for point in found] == [0, 3, 6, 7]
    for point in found:
        here = places[int(point.step)]
        assert point.finetuning_loss == pytest.approx(0.5 * (here - SECOND).square().sum().item(), rel=1e-5)
        assert point.pretraining_loss == pytest.approx(0.5 * (here - FIRST).square().sum().item(), rel=1e-5)


def test_it_ends_at_the_target_and_changes_nothing():
    model = Place().train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = points_of(FineTuning(target_loss=2.0, learning_rate=0.1, max_steps=100, eval_steps=5), model)
    assert found[-1].finetuning_loss <= 2.0 < found[-2].finetuning_loss and found[-1].step < 100
    assert model.place.tolist() == [0, 0] and model.place.grad is None and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_depends_on_the_seed_alone():
    def noisy(seed):
        how = FineTuning(learning_rate=0.1, max_steps=8, eval_steps=4, seed=seed)
        return list(frontier(Place((1.0, 1.0)), lambda model, batch: model(batch), [SECOND], evaluate, how))

    torch.manual_seed(1)
    first = noisy(0)
    torch.manual_seed(2)
    assert noisy(0) == first != noisy(1)


def test_it_ends_where_the_loss_is_not_finite():
    how = FineTuning(max_steps=100, eval_steps=2)
    found = list(frontier(Place(), lambda model, batch: math.nan * model(batch), [SECOND], evaluate, how))
    assert [point.step for point in found] == [0, 2] and not math.isfinite(found[-1].finetuning_loss)
    assert forgetting(found, 1.0) is None


POINTS = [Point(0, 5.0, 2.0), Point(10, 4.0, 2.1), Point(20, 3.0, 2.5), Point(30, 3.5, 2.6), Point(40, 2.0, 4.0)]


def test_the_value_at_the_target_is_interpolated():
    assert at_target(POINTS, 3.75) == pytest.approx((12.5, 3.75, 2.2))
    assert forgetting(POINTS, 3.75) == pytest.approx(0.2)
    assert at_target(POINTS, 3.0) == pytest.approx((20, 3.0, 2.5))  # at a measured point, and the first time
    assert forgetting(POINTS, 2.75) == pytest.approx(2.6 + 0.5 * 1.4 - 2.0)  # 3.25 to 2.0 around it is later


@pytest.mark.parametrize("target", [1.99, 5.0, 6.0])
def test_without_two_points_around_the_target_there_is_no_value(target):
    assert at_target(POINTS, target) is None and forgetting(POINTS, target) is None


def test_the_common_target_is_reached_by_all():
    other = [Point(0, 6.0, 1.0), Point(10, 2.5, 1.2), Point(20, math.nan, math.nan)]
    assert common_target([POINTS, other]) == 2.5
    assert common_target([POINTS, [Point(0, math.nan, 1.0)]]) == math.inf


@pytest.mark.parametrize(
    ("flag", "value"),
    [("target_loss", 0), ("learning_rate", -1), ("max_steps", 0), ("eval_steps", 0), ("max_grad_norm", -1)],
)
def test_values_out_of_range_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"{flag}={value}"):
        FineTuning(**{flag: value})
