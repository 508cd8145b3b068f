"""Galleries of explanations: what they leave, and what they refuse."""

import json
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch.nn import functional as F

from pattern_bench.configuration.checks import check_gallery_overrides
from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError
from pattern_bench.pipeline.gallery import run

SMALL = ["data.limit=300", "model.training.epochs=4"]


CHEAP = [
    "gradient", "smoothgrad", "deconvnet", "guided_backprop", "pattern_net", "lrp_z", "dtd_w2",
    "integrated_gradients", "pattern_attribution",
]  # fmt: skip


@pytest.fixture
def draw(cache_dir, tmp_path):
    def start(*overrides, folder="gallery", small=SMALL):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("gallery", ["logger=none", f"cache.dir={cache_dir}", *small, *overrides])
        check_gallery_overrides(cfg, overrides)
        (tmp_path / folder).mkdir(exist_ok=True)
        run(cfg, tmp_path / folder)
        summary = json.loads((tmp_path / folder / "gallery.json").read_text())
        return tmp_path / folder, summary, load_file(tmp_path / folder / "gallery.safetensors")

    return start


@pytest.mark.slow
def test_fig5_shows_every_cheap_method_for_random_validation_images(draw):
    folder, summary, tensors = draw("images=3", "seed=1")
    assert {path.name for path in folder.iterdir()} == {
        "fig5.png", "gallery.json", "gallery.safetensors", "config.yaml",
    }  # fmt: skip
    assert [column["key"] for column in summary["columns"]] == CHEAP
    assert set(tensors) == {"images", *CHEAP}
    assert summary["left_out"] == {}
    for column in summary["columns"]:
        shown = tensors[column["key"]]
        assert shown.shape == (3, 1, 8, 8)
        assert torch.allclose(shown.abs().flatten(1).amax(1), torch.ones(3))
        assert all(scale > 0 for scale in column["scale"])
    assert len({image["position"] for image in summary["images"]}) == 3
    for image in summary["images"]:
        assert image["right"] == (image["label"] == image["predicted"])
        assert image["true"] == str(image["label"])
        assert 0 < image["confidence"] <= 1
    assert draw("images=3", "seed=1", "show=gradient", folder="again")[1]["images"] == summary["images"]


def test_fig1_groups_one_image_and_methods_keep_their_settings(draw):
    folder, summary, tensors = draw(
        "figure=fig1", "image=5", "show=[occlusion,gradient,pattern_net]", "methods.occlusion.window=2",
        "percentile=99",
    )  # fmt: skip
    assert (folder / "fig1.png").stat().st_size > 10_000
    assert [(c["key"], c["kind"]) for c in summary["columns"]] == [
        ("occlusion", "attribution"), ("gradient", "function"), ("pattern_net", "signal"),
    ]  # fmt: skip
    assert [image["position"] for image in summary["images"]] == [5]
    other = draw("figure=fig1", "image=5", "show=occlusion", "methods.occlusion.window=4", folder="other")[2]
    assert not torch.equal(tensors["occlusion"], other["occlusion"])


def test_fig4b_has_signal_and_attribution_of_every_estimator(draw):
    folder, summary, tensors = draw("figure=fig4b", "image=0")
    assert (folder / "fig4b.png").is_file()
    names = ["random", "x", "w", "a", "a_plus_minus"]
    assert set(tensors) == {"images", *(f"{kind}/{name}" for kind in ("signal", "attribution") for name in names)}
    assert summary["estimators"] == names
    image = tensors["images"]
    assert torch.allclose(tensors["signal/x"], image / image.abs().max())
    # S_x is the z-rule, and S_w's attribution the w²-rule but for what falls on the padding.
    own = draw("figure=fig1", "image=0", "show=[lrp_z,dtd_w2,pattern_attribution]", "estimator=w", folder="own")[2]
    assert torch.allclose(tensors["attribution/x"], own["lrp_z"])
    assert torch.allclose(tensors["attribution/w"], own["pattern_attribution"], atol=1e-6)
    assert 0.9 < F.cosine_similarity(own["pattern_attribution"].flatten(), own["dtd_w2"].flatten(), 0) < 1 - 1e-6


def test_a_method_that_is_not_for_the_network_is_left_out_with_the_reason(draw):
    _, summary, _ = draw(
        "images=1", "show=[guided_backprop,gradient]", "model=imported", "model.path=helpers.small_networks.Smooth",
        "allow_any_target=true",
        small=["data.limit=300"],
    )  # fmt: skip
    assert [column["key"] for column in summary["columns"]] == ["gradient"]
    assert "gelu" in summary["left_out"]["guided_backprop"]


def test_photographs_are_named_by_their_folders_and_unreadable_ones_passed_over(draw, photographs, tmp_path):
    root = photographs(tmp_path / "photographs", count=20)
    for file in sorted(root.rglob("*.jpg"))[:5]:
        file.write_bytes(b"no image")
    _, summary, _ = draw(
        "data=folder", f"data.root={root}", "data.size=16", "data.validation=0.5", "data.fit=0.25", "data.probe=0.25",
        "data.workers=0", "images=5", "show=gradient", small=["model.training.epochs=1"],
    )  # fmt: skip
    for image in summary["images"]:
        assert image["true"] == image["name"].split("/")[0] == f"class{image['label']}"
        assert image["predicted_name"] == f"class{image['predicted']}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["figure=fig2"], "figure=fig2 is unknown"),
        (["image=1"], "image=1 has no effect on figure=fig5"),
        (["figure=fig1", "images=2"], "images=2 has no effect on figure=fig1"),
        (["figure=fig1", "image=60"], "image=60 is out of range: give 0 to 59"),
        (["figure=fig1", "image=-1"], "image=-1 is not possible"),
        (["images=0"], "images=0 is not possible"),
        (["images=61"], "images=61 is more than the 60 validation images"),
        (["show=[]"], "shows nothing"),
        (["show=gradients"], "show=gradients is unknown: did you mean gradient"),
        (["figure=fig4b", "show=b"], "show=b is unknown"),
        (["percentile=0"], "percentile=0 is not possible"),
        (["estimator=x"], "show=pattern_net needs patterns, and estimator=x has none"),
        (["methods.smoothgrad.samples=0"], "smoothgrad: samples=0 is not possible"),
        (["data=toy"], "no classifier|no images"),
        (["criterion=rectified"], "criterion=rectified has no effect on figure=fig5"),
        (["method=gradient"], "method=gradient has no effect"),
        (["layer=features.0"], "layer=features.0 has no effect"),
        (["figure=fig4b", "estimator=a"], "estimator=a has no effect on figure=fig4b"),
    ],
)
def test_mistakes_are_found_before_long_work(draw, monkeypatch, overrides, message):
    def collect(*_):
        raise AssertionError("moments were collected")

    monkeypatch.setattr("pattern_bench.pipeline.patterns.collect", collect)
    with pytest.raises(UserError, match=message):
        draw(*overrides)


@pytest.mark.slow
def test_the_command_draws_or_gives_one_message(command, tmp_path):
    done = command("figure=fig1", "logger=none", *SMALL, module="pattern_bench.gallery")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*-fig1")
    assert (folder / "fig1.png").is_file()
    done = command("degradation.steps=3", module="pattern_bench.gallery")
    assert done.returncode == 1
    assert "error: degradation.steps=3 has no effect on figure=fig5: leave it out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["gallery", "sanity"])
def test_help_imports_no_torch(module):
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('pattern_bench.{module}', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "show" in done.stdout
