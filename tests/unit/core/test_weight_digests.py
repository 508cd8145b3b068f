"""Patterns and moments belong to the weights they were made of, and are refused on others, by layer."""

import copy
import hashlib
import json
import logging
import pickle

import pytest
import torch
from helpers.brute_force import GEOMETRIES
from helpers.own_network import Residual
from safetensors import safe_open
from torch import nn

import pattern_bench as pb
from pattern_bench.api import LayerMoments
from pattern_bench.core import weight_digests
from pattern_bench.errors import UserError
from pattern_bench.storage.tensor_files import read_tensors, write_tensors


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.PReLU(), nn.Flatten(),
        nn.Linear(320, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[7]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
PARTS = [name for name in network().state_dict() if not name.endswith("num_batches_tracked")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network, its moments, and the file of its patterns."""
    model, file = network(), tmp_path_factory.mktemp("saved") / "p.safetensors"
    moments = pb.collect_moments(model, [X])
    pb.fit_patterns(model, moments).save(file)
    return model, moments, file


def changed(model, part):
    model = copy.deepcopy(model)
    model.state_dict()[part].view(-1)[0] += 0.5
    return model


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_counts(saved, part):
    """Biases, what batch norms have learned and seen: whichever changes is named."""
    model, moments, file = saved
    other = changed(model, part)
    layer, _, name = part.rpartition(".")
    patterns = pb.load_patterns(file, model)
    named = rf"layer {layer} has other weights \({name}\)" if name != "weight" else f"layer {layer} has other weights"
    with pytest.raises(UserError, match=rf"file=.*: {named}.* than when its patterns were fitted"):
        pb.load_patterns(file, other)
    with pytest.raises(UserError, match=f"moments: {named}.* collect them again"):
        pb.fit_patterns(other, moments)
    there = pb.collect_moments(other, [X])
    with pytest.raises(UserError, match=f"probe: {named}"):
        pb.evaluate(other, dict(patterns), moments, there)
    with pytest.raises(UserError, match=f"test: {named}"):
        pb.evaluate(other, dict(patterns), there, moments)
    with pytest.raises(UserError, match=f"patterns: {named}"):
        pb.evaluate(other, patterns, there, there)
    pb.evaluate(other, dict(patterns), there, there)  # a mapping of the user's own says nothing


def test_what_does_not_change_the_network_does_not_count(saved):
    model, moments, file = saved
    same = copy.deepcopy(model)
    same[1].num_batches_tracked += 5
    for other in (same, copy.deepcopy(model).double(), copy.deepcopy(model).to(memory_format=torch.channels_last)):
        assert pb.load_patterns(file, other).keys() == moments.keys()
        pb.fit_patterns(other, moments)


def test_marks_do_not_depend_on_images_batches_or_threads(saved):
    model, moments, _ = saved
    torch.set_num_threads(2)
    try:
        assert pb.collect_moments(model, [X[:1] * 5, X[3:5]]).belongs_to == moments.belongs_to
    finally:
        torch.set_num_threads(1)


def test_layers_do_not_depend_on_what_follows_them(tmp_path):
    """A new head leaves the patterns of the features as they are, and the norm after the last of them does not."""
    model = network()
    moments = pb.collect_moments(model, [X], layers=["0", "3"])
    pb.fit_patterns(model, moments).save(tmp_path / "p.safetensors")
    for part in PARTS:
        other = changed(model, part)
        if int(part.split(".")[0]) >= 6:
            assert list(pb.load_patterns(tmp_path / "p.safetensors", other)) == ["0", "3"]
        else:
            with pytest.raises(UserError, match=f"layer {part.split('.')[0]} has other weights"):
                pb.load_patterns(tmp_path / "p.safetensors", other)


def test_a_module_that_came_or_went_is_named(saved):
    model, moments, file = saved

    class Wrapped(nn.Module):
        def __init__(self, scale):
            super().__init__()
            for name, module in copy.deepcopy(model).named_children():
                self.add_module(name, module)
            if scale:
                self.scale = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            x = x * self.scale if hasattr(self, "scale") else x
            for module in self.children():
                x = module(x)
            return x

    pb.load_patterns(file, Wrapped(False).eval())
    with pytest.raises(UserError, match=r"layer at the root has other weights \(scale is new\)"):
        pb.load_patterns(file, Wrapped(True).eval())
    gone = copy.deepcopy(model)
    gone[1] = nn.Identity()
    with pytest.raises(UserError, match=r"layer 1 has other weights \(bias is gone\)"):
        pb.load_patterns(file, gone)
    smaller = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Flatten(), nn.Linear(700, 3)).eval()
    bare = LayerMoments(moments, moments.example)
    with pytest.raises(UserError, match="moments: layer 0 has a weight of shape"):
        pb.fit_patterns(smaller, bare)


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(400, 3)),
    lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(400, 3)),
])  # fmt: skip
def test_computed_weights_count_as_their_layers(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    pb.fit_patterns(model, pb.collect_moments(model, [X], gram=False)).save(tmp_path / "p")
    loaded = pb.load_patterns(tmp_path / "p", model)
    assert any(
        "parametrizations" in name and digest != weight_digests.UNUSED for name, digest in loaded.belongs_to.items()
    )
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2) if hasattr(
            model[0].parametrizations.weight, "original0"
        ) else model[0].parametrizations.weight.original.add_(1)
    with pytest.raises(UserError, match="layer 0 has other weights"):
        pb.load_patterns(tmp_path / "p", model)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_network_of_one_layer(geometry):
    layer, shape = GEOMETRIES[geometry]()
    found = weight_digests.belongs_to(nn.Sequential(layer).eval(), torch.randn(shape), ["0"])
    assert set(found) == {f"0.{name}" for name, _ in layer.named_parameters()}
    assert weight_digests.UNUSED not in found.values()


def test_files_of_earlier_versions_are_taken_and_a_warning_says_what_is_missing(saved, tmp_path, caplog):
    model, _, file = saved
    tensors, metadata = read_tensors(file)
    old = {key: value for key, value in metadata.items() if not key.startswith(("network/", "response/"))}
    write_tensors(tmp_path / "old", tensors, old)
    with caplog.at_level(logging.WARNING):
        assert pb.load_patterns(tmp_path / "old", changed(model, "1.running_mean")).estimator == "a_plus_minus"
    assert caplog.text.count("does not tell all weights") == 1
    mark = hashlib.sha256(model[0].weight.detach().numpy().tobytes()).hexdigest()
    write_tensors(tmp_path / "marked", tensors, {**old, "weight/0": mark})
    pb.load_patterns(tmp_path / "marked", model)
    with pytest.raises(UserError, match="layer 0 has other weights"):
        pb.load_patterns(tmp_path / "marked", changed(model, "0.weight"))


def test_moments_know_what_they_belong_to_after_a_file(saved):
    model, moments, _ = saved
    again = pickle.loads(pickle.dumps(moments))
    assert again.belongs_to == moments.belongs_to
    with pytest.raises(UserError, match="layer 0 has other weights"):
        pb.fit_patterns(changed(model, "0.bias"), again)
    again["0"].xg[0, 0] = torch.nan
    with pytest.raises(UserError, match="moments of layer 0 hold NaN"):
        pb.fit_patterns(model, again)


def test_a_runs_patterns_are_refused_on_another_network(run_job):
    own = ["model=imported", "model.path=helpers.own_network.Residual", "allow_any_target=true"]
    folder = run_job(*own, "data.limit=60", "degradation.images=2")
    file = folder / "patterns.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert {"model", "data", "estimator", "split", "images", "seed", "model_fingerprint"} <= metadata.keys()
    model = Residual().eval()
    assert set(pb.load_patterns(file, model)) == {
        layer["layer"] for layer in json.loads((folder / "summary.json").read_text())["rho"]["layers"]
    }
    for layer, part in (("norm", "running_var"), ("norm", "bias"), ("third", "bias"), ("head", "weight")):
        other = changed(model, f"{layer}.{part}")
        with pytest.raises(UserError, match=f"layer {layer} has other weights"):
            pb.load_patterns(file, other)
