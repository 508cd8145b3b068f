"""Classes that are found by their package."""

import importlib
import sys

import pytest

from pattern_bench.core.registry import classes_by_name


class Base:
    """Of all below."""

    place = 99


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with three modules of which nobody imports any."""
    (tmp_path / "somebodys").mkdir()
    for name, text in {
        "__init__": "",
        "one": "class One(Base):\n    name, place = 'one', 2\nclass Last(Base):\n    name = 'last'\n",
        "two": "class Nameless(Base):\n    pass\nclass Two(Nameless):\n    name, place = 'two', 1\n",
        "three": "from somebodys.one import One\nclass Early(One):\n    name = 'early'\n",
    }.items():
        head = f"from {__name__} import Base\n" if text else ""
        (tmp_path / "somebodys" / f"{name}.py").write_text(head + text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "somebodys"
    for name in [name for name in sys.modules if name.partition(".")[0] == "somebodys"]:
        del sys.modules[name]


def test_all_modules_are_imported_and_classes_come_by_place_then_name(package):
    elsewhere = type("Elsewhere", (Base,), {"name": "elsewhere", "place": 0})
    found = classes_by_name(Base, package)
    assert list(found) == ["two", "early", "one", "last"]
    assert all(kind.__module__.startswith("somebodys.") for kind in found.values())
    assert elsewhere not in found.values()


def test_a_package_that_is_not_there_is_an_error():
    with pytest.raises(ModuleNotFoundError):
        classes_by_name(Base, "pattern_bench.nothing")
