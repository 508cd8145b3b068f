"""Small networks whose memory runs out where they are told to, and streams and descents over a few images of theirs."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from pattern_bench.core.estimators import Pattern
from pattern_bench.core.probe_sgd import Reader
from pattern_bench.data.splits import Batch, GlobalBatches
from pattern_bench.engine.explanation_streams import AccuracyStream, DegradationStream, ExplanationStream
from pattern_bench.engine.probe_descent import ReaderDescent
from pattern_bench.engine.statistics_streams import MomentStream, ReadingStream
from pattern_bench.engine.training import Learner
from pattern_bench.models.base import Training


class Tight(nn.Module):
    """Passes its input on, where the memory is large enough for so many images: for ``room`` of them."""

    def __init__(self):
        super().__init__()
        self.room = 1000

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return x


class Net(nn.Module):
    """A layer, a place where the memory may be too small, and a layer that runs on both sides of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, stride=1, padding=1)
        self.tight = Tight()
        self.last = nn.Linear(4 * 6 * 6, 5)
        self.inside = 0
        self.double().requires_grad_(False).eval()

    def forward(self, x):
        self.inside = len(x)  # images whose activations take memory
        try:
            x = self.twice(self.first(x).relu_()).relu_()
            x = self.twice(self.tight(x)).relu_()
            return self.last(x.flatten(1))
        finally:
            self.inside = 0


LAYERS = ["first", "twice", "last"]


def batches(images, size=8):
    """As a loader yields them; the last is smaller."""
    targets = torch.arange(len(images)) % 5
    for where in torch.arange(len(images)).split(size):
        yield Batch(images[where], targets[where], where, [])


def shown(stream, images, size=8):
    """The stream, after the images."""
    stream.on_predict_start()
    with torch.no_grad():
        for number, batch in enumerate(batches(images, size)):
            stream.predict_step(batch, number)
    return stream


def fitted(module, images):
    """The module after three epochs."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(batches(images)), batch_size=None, collate_fn=lambda batch: batch))
    return module


class Classifier(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.tight = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), Tight()
        self.last, self.unused = nn.Linear(64, 5), nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return self.last(self.tight(self.norm(self.first(x)).relu()).flatten(1))


def learned(images, room, norm=False):
    """Weights after epochs in which so many images have room."""
    model = Classifier(norm)
    model.tight.room = room
    return fitted(Learner(model, Training(3, 0.05, 8), False, GlobalBatches(19, 8, 0)), images).model.state_dict()


def descended(net, images, room):
    """Readers after epochs in which so many images have room; and the last one's loss."""
    readers = {name: Reader(net.get_submodule(name), p, "all", 1e-3) for name, p in patterns_of(net).items()}
    module = ReaderDescent(net, readers, 0.02, 9, GlobalBatches(19, 8, 0))
    module.calibrate(images[:8], torch.arange(8))
    net.tight.room = room
    fitted(module, images)
    return {name: reader.v.detach() for name, reader in readers.items()}, float(module.trainer.callback_metrics["loss"])


def moments(net, images, gram=True, positions=1.0, layers=LAYERS):
    stream = MomentStream(net, list(layers), gram, 2**30, positions, dict.fromkeys(layers, 3))
    shown(stream, images)
    assert stream.seen.images == len(images)
    return {f"{name}/{key}": t for name, c in stream.watchers.items() for key, t in c.moments().tensors().items()}


def patterns_of(net):
    weights = {name: net.get_submodule(name).weight.flatten(1).clone() for name in LAYERS}
    return {name: Pattern(w, w, torch.zeros(len(w), dtype=torch.bool)) for name, w in weights.items()}


def readers_of(net, images, criterion="all"):
    """Calibrated readers with some v."""
    readers = {name: Reader(net.get_submodule(name), p, criterion, 1e-3) for name, p in patterns_of(net).items()}
    module = ReaderDescent(net, readers, 0.01, 10, GlobalBatches(19, 8, 0))
    module.calibrate(images, torch.arange(len(images)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for reader in readers.values():
            reader.coordinates.copy_(torch.randn(reader.coordinates.shape, generator=generator))
    return readers


class Gradient:
    """An explanation; needs autograd, as most do."""

    def __init__(self, net):
        self.net = net

    def attribute(self, inputs, target):
        with torch.enable_grad():
            x = inputs.clone().requires_grad_()
            return torch.autograd.grad(self.net(x).gather(1, target[:, None]).sum(), x)[0]


def stream_of(kind, net, images):
    if kind == "reading":
        return ReadingStream(net, readers_of(net, images[:8]))
    if kind == "accuracy":
        return AccuracyStream(net)
    if kind == "explanation":
        return ExplanationStream(net, len(images), {"gradient": Gradient(net)})
    order = torch.rand(len(images), 3, 3, generator=torch.Generator().manual_seed(4)).flatten(1).argsort(1)
    return DegradationStream(net, {"gradient": Gradient(net)}, 2, 9, order.view(-1, 3, 3))
