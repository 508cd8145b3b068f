"""``python -m pattern_bench``: composes the configuration and runs the job. Imports torch only when there is work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pattern_bench.config import check_complete
from pattern_bench.errors import UserError

HERE = Path(__file__).parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: DictConfig) -> None:
    check_complete(cfg)
    from pattern_bench.job import run

    folder = Path(HydraConfig.get().runtime.output_dir)
    run(cfg, folder)
    print(f"results: {folder}")


def command_line(command: Callable[[], None]) -> None:
    """Runs a Hydra command. A mistake of the user's gets a message and exit code 1, anything else a traceback."""
    # Hydra's own handler would show a traceback for every exception that is not its own.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        command()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        # Hydra keeps what was wrong in the cause of some of its errors.
        messages = [str(e).strip() for e in (error, error.__cause__) if e is not None and str(e).strip()]
        sys.exit("error: " + "\n".join(dict.fromkeys(messages)))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        sys.exit(f"error: cannot use{where} ({error.strerror or error}): free space, or choose another hydra.run.dir")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def main() -> None:
    """The command line of the job."""
    command_line(job)


if __name__ == "__main__":
    main()
