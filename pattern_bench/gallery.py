"""``python -m pattern_bench.gallery``: galleries of explanations. What the command does is in ``galleries.py``."""

from __future__ import annotations

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pattern_bench.__main__ import CONF, command_line, run_folder
from pattern_bench.config import check_complete


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="gallery")
def gallery(cfg: DictConfig) -> None:
    with run_folder(cfg) as folder:
        check_complete(cfg)
        from pattern_bench.galleries import check_overrides, run

        check_overrides(cfg, HydraConfig.get().overrides.task)
        run(cfg, folder)
    print(f"results: {folder}")


if __name__ == "__main__":
    command_line(gallery, "pattern_bench.gallery")
