"""The lists that settings files hold are those of the classes, which Hydra cannot compose them from."""

import pytest
import yaml
from helpers.paths import ROOT

from pattern_bench import methods
from pattern_bench.core import estimators
from pattern_bench.plotting.styles import COLOURS, LINES

CONF = ROOT / "conf"
ESTIMATORS, METHODS = estimators.by_name(), methods.by_name()
WITH_PATTERN = [name for name, kind in ESTIMATORS.items() if kind.has_pattern]


def read(path):
    return yaml.safe_load(path.read_text())


def placed(command, group):
    """What the settings of a command take from the ``group``: by the name it has there."""
    lines = [line for line in read(CONF / f"{command}.yaml")["defaults"] if isinstance(line, dict)]
    return {
        place.rpartition(".")[2]: name
        for line in lines for place, name in line.items() if place.startswith(f"{group}@{group}s.")
    }  # fmt: skip


def swept(name, parameter):
    """The values of a sweep in ``conf/sweep``, as Hydra splits them, and of the same in ``sweeps``."""
    ours = read(CONF / "sweep" / f"{name}.yaml")["hydra"]["sweeper"]["params"][parameter]
    theirs = read(ROOT / "sweeps" / f"{name}.yaml")["parameters"][parameter]["values"]
    return [value.strip() for value in ours.split(",")], theirs


@pytest.mark.parametrize(("group", "kinds"), [("estimator", ESTIMATORS), ("method", METHODS)])
def test_every_class_has_a_settings_file_of_its_name(group, kinds):
    named = {file.stem: read(file)["_target_"] for file in (CONF / group).glob("*.yaml")}
    right = {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in kinds.items()}
    assert named == right, f"a file in conf/{group} for each"


def test_the_gallery_and_the_sanity_checks_know_every_method_and_estimator():
    every = {name: name for name in METHODS}
    assert placed("gallery", "method") == every, "conf/gallery.yaml: method@methods.NAME: NAME for each"
    assert placed("sanity", "method") == every, "conf/sanity.yaml: method@methods.NAME: NAME for each"
    every = {name: name for name in ESTIMATORS}
    assert placed("gallery", "estimator") == every, "conf/gallery.yaml: estimator@estimators.NAME: NAME for each"


def test_every_curve_has_a_settings_file():
    found = {}
    for file in (CONF / "curve").glob("*.yaml"):
        chosen = {key: value for line in read(file)["defaults"] for key, value in line.items()}
        found[file.stem] = (chosen.pop("override /estimator"), chosen.pop("override /method"))
        assert not chosen
    assert found == methods.curves(), "a file in conf/curve for each"


def test_both_sweeps_of_curves_have_them_all():
    ours, theirs = swept("fig4a", "curve")
    assert ours == theirs, "conf/sweep/fig4a.yaml and sweeps/fig4a.yaml"
    assert sorted(ours) == sorted(methods.curves()), "conf/sweep/fig4a.yaml and sweeps/fig4a.yaml"


def test_a_method_is_in_the_sweep_of_curves_or_says_why_not():
    swept_methods = {method for _, method in methods.curves().values()}
    for name, kind in METHODS.items():
        assert (name in swept_methods) != (kind.passes == "hundreds" or bool(kind.no_curve_reason))


@pytest.mark.parametrize(
    ("sweep", "names"), [("fig3", list(ESTIMATORS)), ("criteria", WITH_PATTERN), ("sanity", WITH_PATTERN)]
)
def test_both_sweeps_over_estimators_have_them_all(sweep, names):
    assert swept(sweep, "estimator") == (names, names), f"conf/sweep/{sweep}.yaml and sweeps/{sweep}.yaml"


def test_the_sweep_of_sanity_checks_shows_the_methods_with_patterns():
    show = f"[{','.join(name for name, kind in METHODS.items() if kind.needs_patterns)}]"
    assert read(CONF / "sweep" / "sanity.yaml")["hydra"]["sweeper"]["params"]["show"] == show
    assert f"show={show}" in read(ROOT / "sweeps" / "sanity.yaml")["command"]


def test_labels_are_not_inherited_and_are_the_name_unless_said():
    mine = type("Mine", (METHODS["pattern_net"],), {"name": "mine"})
    assert (mine.label, mine.panel, mine.needs_patterns) == ("mine", "signal, mine", True)
    ours = type("Ours", (ESTIMATORS["a"],), {"name": "ours"})
    assert (ours.label, ours.math_label) == ("ours", "ours")
    assert mine not in methods.by_name().values()  # which no module of the suite defines


@pytest.mark.parametrize("kinds", [ESTIMATORS, METHODS])
def test_labels_and_places_tell_classes_apart(kinds):
    for fact in ("label", "place"):
        said = [getattr(kind, fact) for kind in kinds.values()]
        assert len(set(said)) == len(said)


def test_estimators_have_colours_of_their_own():
    colours = [kind.colour for kind in ESTIMATORS.values()]
    assert len(set(colours)) == len(colours)
    assert set(colours) <= set(COLOURS)


def test_passes_tell_which_methods_take_many():
    assert {name: kind.passes for name, kind in METHODS.items() if kind.passes != "one"} == {
        "integrated_gradients": "tens", "smoothgrad": "tens", "occlusion": "hundreds",
        "prediction_difference": "hundreds",
    }  # fmt: skip
    assert all(kind.many_passes == (kind.passes != "one") for kind in METHODS.values())


def test_methods_with_patterns_have_lines_of_their_own():
    lines = [kind.line for kind in METHODS.values() if kind.needs_patterns]
    assert len(set(lines)) == len(lines)
    assert set(lines) <= set(LINES)
