"""Networks as a user might write them."""

import time

import torch
from torch import nn
from torch.nn import functional as F

from pattern_bench.errors import UserError
from pattern_bench.processes import collectives


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.third = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.third(F.relu(self.second(x))))
        return self.head(x.mean((2, 3)))


class Faulty(Residual):
    """Cannot be made in one of a job's processes."""

    def __init__(self, fails_in=-1, how="user"):
        super().__init__()
        if collectives.rank() == fails_in:
            if how == "user":
                raise UserError("arguments.fails_in is this very process: give another")
            raise ZeroDivisionError("a bug in one process")
        if how == "waits":
            time.sleep(600)


class InPrecision(Residual):
    """The same in another precision, as weights are often published."""

    def __init__(self, dtype):
        super().__init__()
        with torch.no_grad():
            # Numbers that every precision holds, so that the networks are the same.
            for tensor in self.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.bfloat16())
        self.to(getattr(torch, dtype))
