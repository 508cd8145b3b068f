"""``python -m pattern_bench``: the main job."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from pattern_bench.commands.hydra_entry import run_folder, run_hydra_command, start
from pattern_bench.configuration.checks import check_complete
from pattern_bench.configuration.location import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    """Run the job that ``cfg`` describes in Hydra's folder for it."""
    with run_folder(cfg) as folder:
        check_complete(cfg)
        from pattern_bench.pipeline.job import run

        start(run, cfg, folder)


def main() -> None:
    """The command line."""
    run_hydra_command(job)
