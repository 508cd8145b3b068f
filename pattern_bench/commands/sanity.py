"""``python -m pattern_bench.sanity``: sanity checks of explanations."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pattern_bench.commands.hydra_entry import run_folder, run_hydra_command, tell_results
from pattern_bench.configuration.checks import check_complete, check_sanity_overrides
from pattern_bench.configuration.location import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="sanity")
def sanity(cfg: DictConfig) -> None:
    """Run what ``cfg`` describes in Hydra's folder for it."""
    with run_folder(cfg) as folder:
        check_complete(cfg)
        check_sanity_overrides(HydraConfig.get().overrides.task)
        from pattern_bench.pipeline.sanity import run

        run(cfg, folder)
    tell_results(folder)


def main() -> None:
    """The command line."""
    run_hydra_command(sanity, "pattern_bench.sanity")
