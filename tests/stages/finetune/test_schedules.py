"""Learning rates move as their formulas say, from each parameter group's own rate."""

import math

import pytest
import torch

from stages.errors import StageFailed
from stages.finetune.recipe import Recipe
from stages.finetune.schedules import epoch, scheduler, total_steps


def recipe(**fields):
    given = {"data": ({"dataset": "d"},), "batch_size": 8, "learning_rate": 1.0, "steps": 10}
    return Recipe.model_validate(given | fields)


def rates(given, rows=100):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule, found = scheduler(given, rows, optimizer), []
    for _ in range(total_steps(given, rows)):
        found.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(found[-1] / 10)
        optimizer.step()
        schedule.step()
    return found


def wave(cycles, x):
    return max(0.0, (1 + math.cos(2 * math.pi * cycles * x)) / 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 2}, [0, 0.5] + [1] * 8),
        ({}, [1 - n / 10 for n in range(10)]),
        ({"warmup_steps": 5}, [n / 5 for n in range(5)] + [1 - n / 5 for n in range(5)]),
        ({"schedule": "cosine"}, [wave(0.5, n / 10) for n in range(10)]),
        ({"schedule": {"kind": "cosine", "cycles": 3.0}}, [wave(3, n / 10) for n in range(10)]),
        ({"schedule": {"kind": "step", "gamma": 0.5, "every": 4}},
         [1] * 4 + [0.5] * 4 + [0.25] * 2),
        # 20 rows and batches of 8: the second epoch begins with the fourth batch.
        ({"schedule": {"kind": "step", "gamma": 0.85}, "steps": None, "epochs": 2, "rows": 20},
         [1] * 3 + [0.85] * 2),
        ({"warmup_ratio": 0.25, "schedule": "constant"}, [0, 1 / 3, 2 / 3] + [1] * 7),
    ],
)  # fmt: skip
def test_rates_follow_the_formula(fields, expected):
    rows = fields.pop("rows", 100)
    assert rates(recipe(**fields), rows) == pytest.approx(expected)


def test_epochs_become_steps():
    given = recipe(steps=None, epochs=3)
    assert total_steps(given, 21) == 8  # ⌈63 / 8⌉
    assert [epoch(given, 21, step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    with pytest.raises(StageFailed, match="warmup_steps: 9 is more than the 8 steps"):
        total_steps(recipe(steps=None, epochs=3, warmup_steps=9), 21)
