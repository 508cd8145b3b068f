"""Names in figures are drawn as they are, whatever they are made of."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pattern_bench.plotting import figures

NAMES = [
    "price_$50_to_$100", r"$\frac{$", "$x$", "a$b", r"a\$b$c", "$$", r"\alpha_{1}^2", "two\nlines", "%d {0} {x}",
    "_own", "שלום", "a" * 700, "$S", r"\$S_x\$", "tab\there", "-1", "=1+1", "<b>&amp;</b>", "",
]  # fmt: skip


@pytest.fixture
def texts(monkeypatch):
    """What each figure that is saved says: its text and whether it is read as a formula, as of the last figure."""
    seen = []
    save = Figure.savefig

    def saved(figure, *given, **named):
        done = save(figure, *given, **{**named, "dpi": 40})
        seen[:] = [(text.get_text(), text.get_parse_math()) for text in figure.findobj(Text) if text.get_text()]
        return done

    monkeypatch.setattr(Figure, "savefig", saved)
    return seen


def shown(texts):
    return [text.strip() for text, formula in texts if not formula]


@pytest.mark.parametrize("name", NAMES)
def test_captions_titles_and_labels_are_drawn_as_they_are(texts, tmp_path, name):
    images = torch.rand(1, 3, 6, 6)
    expected = name if len(name) < 160 else "a" * 80 + "…" + "a" * 80
    figures.draw_explanations(images, {f"signal {name}": images, name: images}, [name], tmp_path / "a.png")
    assert [text for text in shown(texts) if text == expected.strip()] == [expected.strip()] * 2 * bool(name.strip())
    assert Image.open(tmp_path / "a.png").width < 900
    panel = figures.Panel(name, images[0], "input")
    figures.draw_panels([[panel, None]], [name], tmp_path / "b.png")
    assert [text for text in shown(texts) if text == expected.strip()] == [expected.strip()] * 2 * bool(name.strip())


@pytest.mark.parametrize("name", [name for name in NAMES if name and len(name) < 160])
def test_names_of_models_layers_estimators_and_methods_are_drawn_as_they_are(texts, tmp_path, name):
    rho = pd.DataFrame(
        {"model": name, "data": name, "layer": [name, "other", name], "layer_index": [0, 1, 0], "criterion": "all",
         "estimator": [name, name, "a"], "probe": name, "neuron": 0, "rho": [0.5, 0.4, 0.3], "dead": False}
    )  # fmt: skip
    assert figures.draw_rho(rho, tmp_path / "rho.png", pd.DataFrame())
    assert f"{name} on {name}, criterion all, probe {name}".strip() in shown(texts)
    assert shown(texts).count(name.strip()) == 3  # both labels of a tick, and the legend
    assert ("$S_a$", True) in texts
    assert (r"$\rho(S)$", True) in texts
    curves = pd.DataFrame(
        {"model": name, "data": name, "estimator": ["none", "none", name, name], "method": [name, name, "x", "x"],
         "step": [0, 1, 0, 1], "probability_mean": 0.5, "probability_std": 0.1, "n": 3}
    )  # fmt: skip
    assert figures.draw_degradation(curves, tmp_path / "degradation.png")
    assert f"{name} on {name} (n = 3)".strip() in shown(texts)
    assert name.strip() in shown(texts)
    table = pd.DataFrame({"method": name, "layer": [name, "b"], "layer_index": [0, 1], "measure": "m", "mean": 0.5,
                          "std": 0.1})  # fmt: skip
    figures.draw_similarity(table, tmp_path / "s.png", f"title {name}", name, {"m": name})
    assert f"title {name}".strip() in shown(texts)
    assert shown(texts).count(name.strip()) == 5  # two labels of axes, two of a tick, and the legend


def test_a_formula_of_ours_beside_a_name_is_one_and_the_name_is_not(texts, tmp_path):
    images = torch.rand(1, 1, 6, 6)
    figures.draw_explanations(images, {"$S_{a+-}$: $5 to $6": images}, ["$5 and $6"], tmp_path / "a.png")
    assert (r"$S_{a+-}$: \$5 to \$6", True) in texts
    assert ("$5 and $6", False) in texts


def test_a_dollar_is_drawn_with_the_pixels_of_a_dollar(tmp_path):
    """Beside a formula, where it is escaped, as in a text without any."""

    def ink(caption):
        images = torch.zeros(1, 1, 6, 6)
        figures.draw_explanations(images, {"x": images}, [caption], tmp_path / "a.png")
        return np.asarray(Image.open(tmp_path / "a.png").convert("L"))

    beside = ink("$S_x$ costs $5 or $6")
    assert beside.shape == ink(r"$S_x$ costs $5 or $6").shape
    assert not np.array_equal(beside, ink("$S_x$ costs 95 or 96"))
    assert not np.array_equal(beside, ink(r"$S_x$ costs \$5 or \$6"))


def test_settings_of_matplotlib_are_as_before_afterwards(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": True, "text.usetex": True}):
        images = torch.rand(1, 1, 6, 6)
        figures.draw_explanations(images, {"x": images}, ["$a$"], tmp_path / "a.png")
        assert matplotlib.rcParams["text.parse_math"]
        assert matplotlib.rcParams["text.usetex"]
