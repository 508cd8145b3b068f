"""What networks with other outputs than logits learn."""

import torch
from helpers.endings import Ending, Named, images, plain
from torch.nn import functional as F

from pattern_bench.core.outputs import heads
from pattern_bench.engine.training import AUXILIARY, Learner


class Batches:
    seed = 0

    def __len__(self):
        return 1


def learner(model, regression=False):
    from pattern_bench.models.base import Training

    return Learner(model, Training(1, 0.1, 6), regression, Batches())


def test_auxiliary_heads_count_in_training():
    x, targets = images(), torch.tensor([0, 1, 2, 3, 4, 0])
    z = torch.randn(6, 5)
    for outputs in ((z, -z, x), Named(z, -z), {"aux": -z, "logits": z}):
        own, *auxiliary = heads(outputs)
        assert torch.equal(own, z)
        assert len(auxiliary) == 1
        assert torch.equal(auxiliary[0], -z)
    model = Ending(lambda z: Named(z, -z))
    z = model(x).logits
    expected = F.cross_entropy(z, targets) + AUXILIARY * F.cross_entropy(-z, targets)
    found = learner_step(learner(model), x, targets)
    torch.testing.assert_close(found, expected.detach())


def learner_step(made, x, targets):
    from types import SimpleNamespace

    made._trainer = SimpleNamespace(global_step=0, current_epoch=0)
    made.descend = lambda count, loss: loss(slice(0, count)).detach()
    type(made).global_step = property(lambda self: 0)
    try:
        return made.training_step(SimpleNamespace(images=x, targets=targets), 0)
    finally:
        del type(made).global_step


def test_one_logit_is_trained_on_two_classes():
    x, targets = images(), torch.tensor([0, 1, 1, 0, 1, 0])
    model = plain(1)
    expected = F.binary_cross_entropy(model(x).sigmoid().squeeze(1), targets.float())
    torch.testing.assert_close(learner_step(learner(model), x, targets), expected.detach())
