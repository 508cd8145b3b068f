"""Models of timm: their weights, from files and by tag, and what is refused."""

import copy
import sys

import pytest
import torch

from pattern_bench.configuration.build import build
from pattern_bench.errors import UserError


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="the extra 'timm' is not installed")


def source(configure, *overrides):
    return build(configure("model=timm", *overrides).model)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_timm_weights_from_a_file(timm, configure, tmp_path, suffix):
    from safetensors.torch import save_file

    state = {key: torch.rand_like(t) if t.is_floating_point() else t for key, t in
             timm.create_model("mobilenetv3_small_050").state_dict().items()}  # fmt: skip
    file = tmp_path / f"w{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    chosen = source(configure, "model.architecture=mobilenetv3_small_050", f"model.weights={file}")
    model = chosen.build(torch.rand(3, 64, 64), 10)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert chosen.name == "mobilenetv3_small_050"


def test_timm_weights_are_downloaded_by_tag_and_bring_their_transform(timm, configure, monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append((a, k)) or create("resnet18"))
    tagged = source(configure, "model.architecture=resnet18", "model.weights=a1_in1k")
    tagged.build(torch.rand(3, 64, 64), 1000)
    default = source(configure, "model.architecture=resnet18")
    default.build(torch.rand(3, 64, 64), 1000)
    assert asked == [(("resnet18.a1_in1k",), {"pretrained": True}), (("resnet18",), {"pretrained": True})]
    text = repr(tagged.transform())
    assert "Resize(size=235, interpolation=bicubic" in text
    assert "CenterCrop(size=(224, 224))" in text
    assert text == repr(copy.deepcopy(tagged).transform())
    assert "0x" not in text
    assert source(configure, "model.architecture=resnet18", "model.weights=null").transform() is None


def test_timm_without_network_says_what_to_do(timm, configure, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route\nsecond line")

    chosen = source(configure, "model.architecture=resnet18")
    monkeypatch.setattr(timm, "create_model", fail)
    message = r"^model.weights=DEFAULT of timm's resnet18 cannot be downloaded \(no route\).*model.weights=FILE"
    with pytest.raises(UserError, match=message):
        chosen.build(torch.rand(3, 64, 64), 1000)


def test_wrong_timm_models_are_refused(timm, configure):
    with pytest.raises(UserError, match=r"model.architecture=resnet19 is no model of timm: did you mean .*resnet18"):
        source(configure, "model.architecture=resnet19")
    with pytest.raises(UserError, match=r"model.weights=a9 is neither a file.*DEFAULT, a1_in1k.* or null for random"):
        source(configure, "model.architecture=resnet18", "model.weights=a9")
    with pytest.raises(UserError, match=r"model.weights=/no/such.pt is not a file"):
        source(configure, "model.architecture=resnet18", "model.weights=/no/such.pt").build(torch.rand(3, 9, 9), 1)


def test_without_timm_the_extra_is_named(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"resnet18 needs the package timm.*pip install 'pattern_bench\[timm\]'"):
        source(configure, "model.architecture=resnet18")
