"""Numbers that are none, in weights, images, activations and descents: named, and never counted."""

import json
import types

import pandas as pd
import pytest
import torch
from helpers.small_jobs import SMALL, tables_of
from helpers.tight_networks import Classifier, fitted, moments, readers_of, shown, stream_of
from safetensors.torch import load_file, save_file

from pattern_bench.data.base import TensorPool
from pattern_bench.data.splits import GlobalBatches
from pattern_bench.engine.explanation_streams import ExplanationStream
from pattern_bench.engine.probe_descent import ReaderDescent
from pattern_bench.engine.statistics_streams import ReadingStream
from pattern_bench.engine.training import Learner
from pattern_bench.errors import UserError
from pattern_bench.models.base import Training
from pattern_bench.pipeline import moments as moments_stage
from pattern_bench.pipeline.job import run


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused_before_anything(run_job, trained, tmp_path, value, monkeypatch):
    (file,) = (trained[1] / "models").glob("*.safetensors")
    weights = load_file(file)
    weights["features.5.weight"][3, 2, 1, :2] = float(value)
    save_file(weights, tmp_path / "weights.safetensors")
    monkeypatch.setattr("pattern_bench.pipeline.job.run_prepared", None)
    expected = r"layer features.5 has NaN or Inf in 2 of 4608 values of its weight: give other weights"
    with pytest.raises(UserError, match=expected):
        run_job(*SMALL, f"model.weights={tmp_path / 'weights.safetensors'}")


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [1.0, 0.1])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_image_that_is_no_number_is_named_by_its_batch(net, images, gram, positions, value, monkeypatch):
    """A single pixel of the last image; sampling may leave out all that it reaches."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    images[18, 1, 2, 3] = float(value)
    message = r"layer first: NaN or Inf in its input or output, for the batch of images 16 to 18 of the split"
    with pytest.raises(UserError, match=message):
        moments(net, images, gram, positions)
    layers = ["twice", "last"]
    with pytest.raises(UserError, match="layer twice: NaN or Inf"):
        moments(net, images, gram, positions, layers)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("positions", [1.0, 0.1])
@pytest.mark.parametrize("where", ["first", "twice", "last", "closed"])
def test_an_activation_that_overflows_is_named_by_its_layer(net, images, gram, positions, where, monkeypatch):
    """``closed``: to -Inf, of which the ReLU behind leaves no trace."""
    monkeypatch.setattr("pattern_bench.core.collector.LEAST_POSITIONS", 2)
    layer = "twice" if where == "closed" else where
    net.get_submodule(layer).bias[1] = -1e308 if where == "closed" else 1e308
    net.get_submodule(layer).weight[1] = -1e308 if where == "closed" else 1e308
    net.first.bias.fill_(5.0)
    with pytest.raises(UserError, match=rf"layer {layer}: NaN or Inf .* images 0 to 7 of the split"):
        moments(net, images, gram, positions)
    if where == "closed":
        with torch.no_grad():
            assert net(images).isfinite().all()


@pytest.mark.parametrize("criterion_name", ["all", "rectified", "positive"])
@pytest.mark.parametrize("where", ["image", "overflow", "closed"])
def test_readers_neither_learn_from_nor_are_scored_on_what_is_no_number(net, images, criterion_name, where):
    readers = readers_of(net, images[:8], criterion_name)
    module = ReaderDescent(net, readers, 0.02, 9, GlobalBatches(19, 8, 0))
    if where == "image":
        images[17, 0, 0, 0] = torch.nan
    else:  # in the third batch alone
        net.last.weight[1] = -1e308 if where == "closed" else 1e308
        images[:16], images[16:] = 0, images[16:] * 1e3
        net.first.bias.zero_()
        net.twice.bias.zero_()
    message = rf"layer {'first' if where == 'image' else 'last'}: NaN or Inf .* images 16 to 18 of the split"
    with pytest.raises(UserError, match=message):
        shown(ReadingStream(net, readers), images)
    with pytest.raises(UserError, match=message):
        fitted(module, images)
    with pytest.raises(UserError, match=message):
        module.calibrate(images[16:], torch.arange(16, 19))


def test_a_descent_that_diverges_names_its_learning_rate(net, images):
    readers = readers_of(net, images[:8])
    with pytest.raises(UserError, match=r"probe.learning_rate=1e\+200: the loss of v is NaN or infinite in step 1"):
        fitted(ReaderDescent(net, readers, 1e200, 9, GlobalBatches(19, 8, 0)), images)


@pytest.mark.parametrize("kind", ["accuracy", "explanation", "degradation"])
def test_answers_that_are_no_numbers_are_neither_counted_nor_explained(net, images, kind):
    """Under estimator=x nothing else looks at the activations."""
    stream = stream_of(kind, net, images)
    images[17, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layer first: NaN or Inf .* images 16 to 18 of the split"):
        shown(stream, images)
    assert stream.seen.images == 16


def test_an_explanation_that_is_no_number_is_refused(net, images):
    method = types.SimpleNamespace(attribute=lambda inputs, target: inputs / 0)
    with pytest.raises(UserError, match=r"explanation/mine: NaN or Inf for images 0 to 7 of the split: choose another"):
        shown(ExplanationStream(net, len(images), {"mine": method}), images)


def test_training_that_diverges_names_its_learning_rate(images):
    model = Classifier(False)
    images[9] = torch.inf
    with pytest.raises(UserError, match=r"model.training.learning_rate=0.1: the loss is NaN or infinite in epoch 0"):
        fitted(Learner(model, Training(3, 0.1, 8), False, GlobalBatches(19, 8, 0)), images)


def spoilt(image, broken):
    """A pool's ``image``, which is NaN for one of them."""
    return lambda self, index: image(self, index) * torch.nan if index == broken else image(self, index)


@pytest.mark.parametrize("probe", [["probe=closed_form"], ["probe=sgd", "probe.steps=9"]])
def test_what_was_finished_before_an_image_that_is_no_number_is_kept(
    trained, configure, own_cache, tmp_path, probe, monkeypatch
):
    """An image of the probe split: patterns are there and the fit moments in the cache, for the run with it mended."""
    splits = pd.read_csv(trained[0] / "splits.csv")
    broken = int(splits[splits.split == "probe"]["index"].iloc[37])
    (weights,) = (tmp_path / "cache" / "models").glob("*.safetensors")
    job = [*SMALL, own_cache, f"model.weights={weights}", *probe]
    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(TensorPool, "image", spoilt(TensorPool.image, broken))
        message = r"layer features.0: NaN or Inf in its input or output, for the batch of images .* of the split: mend"
        with pytest.raises(UserError, match=message):
            run(configure(*job), folder)
    assert not (folder / "summary.json").exists()
    assert load_file(folder / "patterns.safetensors")["features.0/positive"].isfinite().all()
    assert json.loads((folder / "accuracy.json").read_text())["images"] == 40
    passes, over = [], moments_stage.stream_over
    monkeypatch.setattr(moments_stage, "stream_over", lambda *given, **more: passes.append(1) or over(*given, **more))
    run(configure(*job), folder)
    assert len(passes) == (2 if len(probe) == 1 else 0)  # the probe and validation splits, not the fit split again
    if len(probe) == 1:
        for mine, plain in zip(tables_of(folder), tables_of(trained[0]), strict=True):
            pd.testing.assert_frame_equal(mine, plain)
