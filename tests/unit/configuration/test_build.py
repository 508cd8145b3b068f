import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pattern_bench.configuration.build import build
from pattern_bench.configuration.checks import check_complete
from pattern_bench.configuration.location import CONF
from pattern_bench.errors import UserError

CHOICES = [
    f"{group.name}={file.stem}"
    for group in sorted(Path(CONF).iterdir())
    if group.is_dir()
    for file in sorted(group.glob("*.yaml"))
    if file.stem != "common"
]


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_composes_and_builds(configure, choice):
    group = choice.split("=")[0]
    chosen = {
        name for default in OmegaConf.load(CONF / "config.yaml").defaults if default != "_self_" for name in default
    }
    cfg = configure(choice if group in chosen else f"+{choice}")
    mandatory = {"model.path": "torch.nn.Identity", "model.architecture": "resnet18", "data.root": "/no"}
    for key, value in mandatory.items():
        if key.startswith(group) and OmegaConf.is_missing(cfg[group], key.split(".")[1]):
            with pytest.raises(UserError, match=f"{key} has no value"):
                check_complete(cfg)
            OmegaConf.update(cfg, key, value)
    check_complete(cfg)
    OmegaConf.to_container(cfg, resolve=True)
    if "_target_" in cfg.get(group, {}) and choice != "trainer=gpu":
        build(cfg[group])


def test_the_toy_data_bring_the_linear_model_unless_told_otherwise(configure):
    assert configure("data=toy").model.name == "linear"
    assert configure("data=toy", "model=small_vgg").model.name == "small_vgg"


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["--version"]])
def test_looking_at_the_configuration_imports_no_torch(flags):
    code = (
        f"import sys; sys.argv = ['pattern_bench', *{flags}]\n"
        "from pattern_bench.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_shell_completes_groups_and_sweeps(command, monkeypatch):
    """Through what Hydra's completion asks, whichever shell it is."""
    for line, choices in (
        ("pattern-bench model=vgg", {"model=vgg16", "model=vgg16_features"}),
        ("pattern-bench -m +sweep=fig", {"+sweep=fig3", "+sweep=fig4a"}),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert set(command("-sc", "query=bash").stdout.split()) == choices
