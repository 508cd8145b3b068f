"""The examples in docstrings run, and every public function and class of these packages has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

PACKAGES = tuple(f"pattern_bench.{package}" for package in ("core", "metrics", "methods", "api"))


def modules_of(package):
    found = importlib.import_module(package)
    return [package, *(module.name for module in pkgutil.walk_packages(found.__path__, f"{package}."))]


MODULES = ["pattern_bench.errors", *(module for package in PACKAGES for module in modules_of(package))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    # A class in an example is none of its module, or a package would find it among its own.
    assert doctest.testmod(importlib.import_module(name), extraglobs={"__name__": "__main__"}).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_has_an_example(name):
    module = importlib.import_module(name)
    own = [
        (attribute, value)
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
    ]
    assert [attribute for attribute, value in own if ">>>" not in (value.__doc__ or "")] == []
