"""Reject inputs that the fused pair loss cannot take."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lpo_fast.kernels.pair_loss import pair_loss
from lpo_fast.method.schedule import Schedule
from tests.helpers.models import DEVICE
from tests.helpers.pair_loss import SETTINGS, batch, schedules


@pytest.mark.parametrize("change, message", [
    ({"x_t": torch.zeros(3, 4, 7)}, "x_t has shape (3, 4, 7), expected (N, C, H, W)"),
    ({"x_t": torch.zeros(3, 4, 0, 5)}, "no elements"),
    ({"winner": torch.zeros(3, 4, 7, 6)}, "winner has shape (3, 4, 7, 6), expected (3, 4, 7, 5)"),
    ({"loser": torch.zeros(3, 4, 7, 5, dtype=torch.float64)},
     "loser is torch.float64, expected torch.float32"), ({"x_t": torch.zeros(
        3, 4, 7, 5, dtype=torch.float16)}, "x_t is torch.float16, expected torch.float32 or torch.float64"),
    ({"winner": torch.zeros(3, 4, 7, 5, requires_grad=True)},
     "winner requires a gradient, but the operator has none"),
    ({"t": torch.zeros(3)}, "t is torch.float32, expected torch.int64"),
    ({"t": torch.zeros(2, dtype=torch.int64)}, "t has shape (2,), expected (3,)"),
    ({"policy": torch.zeros(3, 4, 7, 5)}, "policy has shape (3, 4, 7, 5), expected (6, 4, 7, 5)"),
    ({"reference": torch.zeros(6, 4, 7, 5, dtype=torch.int64)}, "reference is torch.int64"),
    ({"reference": torch.zeros(6, 4, 7, 5, requires_grad=True)},
     "reference requires a gradient, but the operator has none"),
    ({"weight": torch.zeros(3, dtype=torch.bool)}, "weight is torch.bool, expected torch.float32"),
    ({"weight": torch.zeros(3, requires_grad=True)}, "weight requires a gradient, but the operator has none"),
    ({"weight": torch.zeros(3, dtype=torch.float64)}, "weight is torch.float64, expected torch.float32"),
    ({"policy": torch.zeros(6, 4, 7, 5, dtype=torch.float64)},
     "policy is torch.float64, expected torch.float32 or torch.float16 or torch.bfloat16"),
    ({"reference": torch.zeros(6, 4, 7, 5, dtype=torch.float64)},
     "reference is torch.float64, expected torch.float32"),
    ({"policy": (torch.zeros(3, 4, 7, 5),) * 2}, "policy is of type tuple, expected Tensor"),
    ({"x_t": None}, "x_t is of type NoneType, expected Tensor"),
    ({"guidance": torch.tensor(5.0)}, "guidance is of type Tensor, expected int or float"),
    ({"beta": True}, "beta is of type bool, expected int or float"),
    ({"eps": -0.1}, "eps is -0.1, expected a finite number of at least 0"),
    ({"eps": -1}, "eps is -1.0, expected"), ({"sched": replace(
        schedules("epsilon"), table=torch.zeros(0, 7))}, "sched.table has shape (0, 7): no timesteps"),
    ({"weight": torch.zeros(3, device="meta")}, "weight is on meta"),
    ({"guidance": math.nan}, "guidance is nan, expected a finite number"),
    ({"guidance": math.inf}, "guidance is inf"), ({"beta": -math.inf}, "beta is -inf"),
    ({"eps": math.nan}, "eps is nan"),
])
def test_rejects(change: dict, message: str) -> None:
    b = batch((3, 4, 7, 5))
    def here(x):
        return (x.to(DEVICE) if isinstance(x, Schedule) or isinstance(x, Tensor) and x.device.type == "cpu"
                else x)
    moved = {name: here(x) for name, x in change.items()}
    with pytest.raises(ValueError) as error:
        pair_loss(**{"sched": schedules("epsilon")} | b._asdict() | SETTINGS | moved)
    assert message in str(error.value)
