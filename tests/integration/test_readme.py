"""The README's example."""

import re

import pytest
from helpers.paths import ROOT


@pytest.mark.slow
def test_the_readmes_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "patterns.safetensors").is_file()
    assert (tmp_path / "gallery.png").is_file()
