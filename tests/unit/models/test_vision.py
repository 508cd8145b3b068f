import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from pattern_bench.configuration.build import build
from pattern_bench.core.network import layers_in_order
from pattern_bench.errors import UserError

PHOTO, DIGIT = torch.rand(3, 64, 64), torch.rand(1, 8, 8)


def built(configure, *overrides, sample=PHOTO, classes=10):
    return build(configure(*overrides).model).build(sample, classes)


def test_weights_from_safetensors_and_from_a_state_dict(configure, tmp_path):
    state = {key: torch.randn_like(t) for key, t in models.squeezenet1_1().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": state}, tmp_path / "nested.pth")
    for name in ("w.safetensors", "w.pt", "nested.pth"):
        model = built(configure, "model=squeezenet1_1", f"model.weights={tmp_path / name}")
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[key])


def test_half_precision_weights_of_a_part(configure, tmp_path):
    state = {k: t.half() for k, t in models.vgg11().features.state_dict(prefix="features.").items()}
    save_file(state, tmp_path / "w.safetensors")
    overrides = ["model=vgg16_features", "model.architecture=vgg11", f"model.weights={tmp_path / 'w.safetensors'}"]
    model = built(configure, *overrides)
    assert model.features[0].weight.dtype == torch.float32
    assert torch.equal(model.features[0].weight, state["features.0.weight"].float())
    assert layers_in_order(model, PHOTO[None])[0] == "features.0"


def test_weights_of_the_enum_are_downloaded_and_bring_their_transform(configure, tmp_path, monkeypatch):
    state = models.resnet18().state_dict()
    torch.save(state, tmp_path / "resnet18-00000000.pth")
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    asked = {}

    def download(url, **settings):
        asked.update(url=url, **settings)
        return torch.load(tmp_path / "resnet18-00000000.pth", weights_only=settings["weights_only"])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    source = build(configure("model=resnet18", "model.weights=IMAGENET1K_V1").model)
    model = source.build(PHOTO, 1000)
    assert asked["url"] == weights.url
    assert asked["weights_only"]
    assert asked["check_hash"]
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert repr(source.transform()) == repr(weights.transforms())


def test_without_network_a_download_says_what_to_do(configure, monkeypatch):
    from urllib.error import URLError

    def fail(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"model.weights=DEFAULT cannot be downloaded.*no route.*model.weights=FILE"):
        built(configure, "model=alexnet")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=torchvision", "model.architecture=resnet19"], r"resnet19 is no classification model.*resnet18"),
        (["model=resnet18", "model.weights=IMAGENET1K_V9"], r"IMAGENET1K_V9 is neither a file nor weights"),
        (["model=resnet18", "model.weights=/no/such.safetensors"], r"such.safetensors is not a file"),
        (["model=vgg16_features", "model.weights=null", "model.part=body"], r"model.part=body is no part of vgg16"),
        (
            ["model=imported", "model.path=no.such.Net", "allow_any_target=true"],
            r"model.path=no.such.Net cannot be imported",
        ),
        (["model=imported", "model.path=torch.nn.ReLU", "+model.arguments.size=3"], r"does not take"),
        (["model=imported", "model.path=builtins.dict", "allow_any_target=true"], r"gave a dict"),
    ],
)
def test_wrong_models_are_refused(configure, overrides, message):
    with pytest.raises(UserError, match=message):
        built(configure, *overrides)


def test_weights_that_do_not_fit_name_the_keys(configure, tmp_path):
    state = models.squeezenet1_1().state_dict()
    del state["features.0.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["classifier.1.weight"] = torch.zeros(10, 512, 1, 1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        built(configure, "model=squeezenet1_1", f"model.weights={tmp_path / 'w.safetensors'}")
    for part in ("missing features.0.bias", "not in the model extra.weight", "classifier.1.weight (10, 512, 1, 1)"):
        assert part in str(caught.value)


def test_a_pickle_with_code_is_not_run(configure, tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "w.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, tmp_path / "zip.pt")
    for name in ("w.pt", "zip.pt"):
        with pytest.raises(UserError, match="cannot be read as a state dict"):
            built(configure, "model=squeezenet1_1", f"model.weights={tmp_path / name}")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        built(configure, "model=squeezenet1_1", f"model.weights={tmp_path / 'w.safetensors'}")


TRAINED = "model.training={epochs: 1, learning_rate: 0.01, batch_size: 8}"


@pytest.mark.parametrize(("training", "outputs"), [([], 1000), ([TRAINED], 7)])
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2", "timm"])
def test_a_network_has_the_outputs_of_what_it_is_trained_on(configure, model, training, outputs):
    chosen = [f"model={model}"]
    if model == "timm":
        pytest.importorskip("timm")
        chosen.append("model.architecture=resnet18")
    assert built(configure, *chosen, *training, "model.weights=null", classes=7)(PHOTO[None]).shape == (1, outputs)
