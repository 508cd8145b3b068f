"""Weight files as trainers leave them: what is taken off names, what is found in checkpoints, and what is refused."""

import argparse
import logging

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from pattern_bench.errors import UserError
from pattern_bench.models.base import load_weights, read_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.module = nn.Linear(2, 3)  # a name that wrappers have, too
        self.register_buffer("index", torch.arange(3))


def network(seed):
    torch.manual_seed(seed)
    return Net()


STATE = network(1).state_dict()


def same(model, state=None):
    return all(torch.equal(tensor, (state or STATE)[key]) for key, tensor in model.state_dict().items())


def loaded(file, model=None):
    model = model or network(0)
    load_weights(model, read_weights(str(file)), f"model.weights={file}", "net")
    return model


def below(prefix, state=None):
    return {f"{prefix}{key}": tensor for key, tensor in (state or STATE).items()}


PREFIXES = ["", "module.", "model.", "_orig_mod.", "net.", "backbone.", "module.model.", "model._orig_mod.module.net.",
            "_orig_mod.module.", "student.encoder.", "features."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off_and_that_is_said_once(tmp_path, caplog, prefix):
    save_file(below(prefix), tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO):
        assert same(loaded(tmp_path / "w.safetensors"))
    assert len(caplog.records) == bool(prefix)
    if prefix:
        assert f"model.weights={tmp_path}/w.safetensors: " in caplog.text


def test_wrappers_within_a_network_are_taken_off_on_either_side(tmp_path):
    torch.save({key.replace("features.", "features._orig_mod."): t for key, t in STATE.items()}, tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt"))
    wrapped = nn.DataParallel(network(0))
    torch.save(STATE, tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt", wrapped), below("module."))


def test_an_average_of_weights_loads(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(network(1))
    torch.save(average.state_dict(), tmp_path / "w.pt")
    assert same(loaded(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": below("model."), "epoch": 1, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1},
         "optimizer_states": [{"state": {0: {"step": torch.zeros(())}}, "param_groups": []}], "callbacks": {}},
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}, "loss": 0.5},
        {"model": STATE, "args": None},
        {"ema": STATE, "epoch": 3},
        {"model": {"state_dict": below("module.")}},
        {"state_dict": STATE, "ema": {key: tensor * 0 for key, tensor in STATE.items()}},
        {"my_own_name": STATE, "best": 0.5},
    ],
)  # fmt: skip
def test_checkpoints_are_looked_into(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "c.ckpt")
    assert same(loaded(tmp_path / "c.ckpt"))


def test_which_of_several_states_is_used_is_said(tmp_path, caplog):
    torch.save({"ema": STATE, "model": STATE}, tmp_path / "c.pt")
    with caplog.at_level(logging.INFO):
        read_weights(str(tmp_path / "c.pt"))
    assert "model of the checkpoint is used; ema is left" in caplog.text


@pytest.mark.parametrize(
    "content", [{}, [STATE], {"epoch": 1}, {"a": STATE, "b": STATE}, {"x": torch.zeros(2), "n": 1}]
)
def test_a_file_without_one_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds no state dict: save model.state_dict"):
        read_weights(str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (network(1), f"besides tensors it holds {Net.__module__}.Net, torch.nn.modules"),
        ({"state_dict": STATE, "hyper_parameters": OmegaConf.create({"a": 1})}, "omegaconf"),
        ({"state_dict": STATE, "hyper_parameters": argparse.Namespace(a=1)}, "argparse.Namespace"),
        ({"model": network(1)}, "a whole pickled model, or a checkpoint with objects in it"),
    ],
)
def test_objects_are_refused_by_name_with_the_remedy_and_not_with_torchs(tmp_path, content, named):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"cannot be read as a state dict .*{named}") as caught:
        read_weights(str(tmp_path / "w.pt"))
    assert "save_file(model.state_dict(), ...)" in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int8", lambda t: t.to(torch.int8)), ("uint8", lambda t: t.to(torch.uint8)), ("bool", lambda t: t > 0),
        ("int64", lambda t: t.long()), ("complex64", lambda t: t.to(torch.complex64)), 
        ("sparse", lambda t: t.to_sparse()),
        ("quantised", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ("without values", lambda t: t.to("meta")),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_real_number_is_refused_by_name(tmp_path, kind, change):
    torch.save({**STATE, "module.weight": change(STATE["module.weight"])}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"no plain real numbers in floating point: module.weight \({kind}\)\. Give"):
        loaded(tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_load_in_the_networks(tmp_path, dtype):
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in STATE.items()}
    save_file(state, tmp_path / "w.safetensors")
    model = loaded(tmp_path / "w.safetensors")
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert same(model, {key: t.to(STATE[key].dtype) for key, t in state.items()})


def test_a_prefix_does_not_hide_what_does_not_fit(tmp_path):
    wrong = below("module.")
    del wrong["module.features.0.bias"]
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"missing .*features.0.bias.*not in the model module.index"):
        loaded(tmp_path / "w.safetensors")
    save_file({**below("model."), "criterion.weight": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"net: not in the model criterion.weight\."):
        loaded(tmp_path / "w.safetensors")
    # Two networks in one file: neither is guessed.
    save_file({**below("teacher."), **below("student.", network(1).state_dict())}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="missing index"):
        loaded(tmp_path / "w.safetensors")
