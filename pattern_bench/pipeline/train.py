"""The weights of a network that comes without: trained on the training images, once, and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from pattern_bench.core.memory import fits
from pattern_bench.data.base import Pool, Source
from pattern_bench.data.splits import GlobalBatches, Split, joined
from pattern_bench.engine.checkpoints import every_epoch
from pattern_bench.engine.progress import Bar
from pattern_bench.engine.training import Learner
from pattern_bench.errors import UserError
from pattern_bench.models.base import ModelSource, Training, fingerprint
from pattern_bench.pipeline.machine import Machine
from pattern_bench.processes import collectives
from pattern_bench.processes.launch import threads_as_alone
from pattern_bench.storage.cache import key_of

TRAINING_VERSION = 3
"""Of how networks are trained; weights of another are trained again."""


def check_trainable(model_source: ModelSource, source: Source, pool: Pool, outputs: int) -> None:
    """
    Raises:
        UserError: where the data cannot train a network with so many outputs.
    """
    if pool.labels is None:
        raise UserError(
            f"model={model_source.name} has no weights and data={source.name} no labels to train it on: "
            "give model.weights=FILE, or images in one subfolder per class"
        )
    if outputs == 1 and not source.regression and pool.classes != 2:
        raise UserError(
            f"model={model_source.name} has one output and data={source.name} {pool.classes} classes: one output "
            "tells two classes apart, so choose a model with as many outputs as classes"
        )


def train(
    model: nn.Module,
    model_source: ModelSource,
    source: Source,
    splits: Mapping[str, Split],
    settings: Mapping[str, Any],
    seed: int,
    machine: Machine,
    bar: Bar,
) -> None:
    """Give ``model`` trained weights, from the cache where an earlier job left them.

    The first process trains, so that they are the same however many there are.

    Args:
        model: with its initial weights, which are replaced.
        model_source: that the model is of, with the settings of its training.
        source: of the images.
        splits: of which ``fit`` and ``probe`` are trained on.
        settings: of the model, a part of the cache's key.
        seed: orders the batches.
        machine: where it is trained, and what keeps the weights.
        bar: moved image by image.

    Raises:
        UserError: where the memory is too small, or the loss is NaN or infinite.
    """
    if collectives.is_rank_zero():
        training: Training = model_source.training  # type: ignore[assignment]
        images = joined(splits["fit"], splits["probe"])
        # The initial weights stand for the architecture; where they are constant, the seed still orders the batches.
        key = key_of(
            version=TRAINING_VERSION, images=images.fingerprint, initial=fingerprint(model, settings),
            training=vars(training), seed=seed, regression=source.regression, **machine.rounding,
        )  # fmt: skip
        with machine.cache.lock("models", key):
            entry = machine.cache.load("models", key)
            if entry is not None:
                model.load_state_dict(entry[0])
            else:
                batches = GlobalBatches(len(images), training.batch_size, seed)
                learner = Learner(model, training, source.regression, batches)
                loader = images.shuffled(batches, source.workers)
                bar.start(training.epochs * len(images), "training", "images")
                _learn(learner, loader, training.epochs, f"training-{key}", machine, bar)
                names = {"model": model_source.name, "data": source.name}
                machine.cache.save("models", key, model.state_dict(), names)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(collectives.broadcast(tensor))


def _learn(learner: Learner, loader: DataLoader, epochs: int, name: str, machine: Machine, bar: Bar) -> None:
    """Train in this process alone, from the last epoch that an earlier run has kept under ``name``."""
    keep, last = every_epoch(machine.folder, name)
    alone = {"devices": 1, "num_nodes": 1, "strategy": SingleDeviceStrategy(machine.device)}
    trainer = machine.trainer(bar, keep, max_epochs=epochs, **alone)
    learner.model.train()
    with threads_as_alone():
        done = fits(lambda: trainer.fit(learner, loader, ckpt_path=last, weights_only=True))
    learner.model.eval()
    if not done:
        raise learner.too_small("the model and what Adam keeps of it")
