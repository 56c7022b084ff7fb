"""Warm-up, and the three curves that follow it."""

import itertools
import math

import pytest
import torch

from fastlm.optim import SGD, AdamW, warmup_schedule


def rates(optimizer, steps, count=None, **options):
    """Of each step, as the optimizer has it when it is taken."""
    scheduler = warmup_schedule(optimizer, steps, **options)
    found = []
    for _ in range(count or steps):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [r[0] for r in found] if len(optimizer.param_groups) == 1 else found


def weight():
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_rises_to_the_group_s_rate_and_falls_to_the_final_one(shape):
    found = rates(AdamW([weight()], 0.5), 100, 105, warmup=9, shape=shape, final=0.1)
    torch.testing.assert_close(found[:10], [0.05 * (i + 1) for i in range(10)])
    assert found[9] == 0.5 and found[99:] == [pytest.approx(0.05)] * 6
    assert all(a >= b for a, b in itertools.pairwise(found[9:]))


def test_curves():
    cosine, linear = (rates(SGD([weight()], 1.0), 11, shape=shape) for shape in ("cosine", "linear"))
    torch.testing.assert_close(cosine, [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(11)])
    torch.testing.assert_close(linear, [1 - i / 10 for i in range(11)])
    stable = rates(SGD([weight()], 1.0), 50, warmup=5, shape="wsd", decay=4)
    assert stable[5:46] == [1.0] * 41
    torch.testing.assert_close(stable[46:], [1 - math.sqrt(i / 4) for i in range(1, 5)])
    fifth = rates(SGD([weight()], 1.0), 50, shape="wsd")
    assert fifth[39] == 1.0 > fifth[40]


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(shape, steps):
    assert all(0 <= r <= 1 for r in rates(SGD([weight()], 1.0), steps, 5, shape=shape))
    assert all(0 <= r <= 1 for r in rates(SGD([weight()], 1.0), steps, 5, shape=shape, warmup=steps - 1))


def test_groups_and_tensors():
    lr = torch.tensor(0.5)
    optimizer = AdamW([{"params": [weight()], "lr": lr}, {"params": [weight()], "lr": 0.1}])
    found = rates(optimizer, 4, shape="linear")
    torch.testing.assert_close(found, [[0.5 * (1 - i / 3), 0.1 * (1 - i / 3)] for i in range(4)])
    assert optimizer.param_groups[0]["lr"] is lr  # a CUDA graph reads it there


def test_resumes():
    optimizer = SGD([weight()], 1.0)
    whole = rates(SGD([weight()], 1.0), 20, warmup=3)
    scheduler = warmup_schedule(optimizer, 20, warmup=3)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    again = SGD([weight()], 1.0)
    resumed = warmup_schedule(again, 20, warmup=3)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert again.param_groups[0]["lr"] == pytest.approx(whole[7])
    again.step()
    resumed.step()
    assert again.param_groups[0]["lr"] == pytest.approx(whole[8])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shape": "square"}, "shape must be one of cosine, linear, wsd, got 'square'"),
        ({"warmup": 10}, "warmup must be at least 0 and below steps, 10, got 10"),
        ({"warmup": -1}, "warmup must be at least 0 and below steps, 10, got -1"),
        ({"final": 1.5}, "final must be in [0, 1], got 1.5"),
        ({"decay": 3}, "decay is for the shape 'wsd', got 3 with 'cosine'"),
        ({"shape": "wsd", "decay": 11}, "decay must be at least 0 and at most steps - warmup, 10, got 11"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError) as raised:
        warmup_schedule(SGD([weight()]), 10, **options)
    assert str(raised.value) == f"fastlm.optim.warmup_schedule: {message}"
