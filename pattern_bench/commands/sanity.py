"""``python -m pattern_bench.sanity``: sanity checks of explanations."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pattern_bench.commands.entry import command_line, run_folder
from pattern_bench.configuration.checks import check_complete
from pattern_bench.configuration.location import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sanity")
def sanity(cfg: DictConfig) -> None:
    """Run what ``cfg`` describes in Hydra's folder for it."""
    with run_folder(cfg) as folder:
        check_complete(cfg)
        from pattern_bench.pipeline.sanity import check_overrides, run

        check_overrides(HydraConfig.get().overrides.task)
        run(cfg, folder)
    print(f"results: {folder}")


def main() -> None:
    """The command line."""
    command_line(sanity, "pattern_bench.sanity")
