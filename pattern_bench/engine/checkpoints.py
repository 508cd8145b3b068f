"""Lightning's state of a training that may be interrupted, kept in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint

from pattern_bench.storage.stage_state import PARTIAL


def every_epoch(folder: Path, name: str) -> tuple[ModelCheckpoint, Path | None]:
    """A callback that keeps Lightning's state after every epoch; and the file with it, where an earlier run left one.

    Args:
        folder: the run's.
        name: of the file, without its suffix.
    """
    file = folder / PARTIAL / f"{name}.ckpt"
    keep = _Checkpoint(file.parent, name, save_on_train_epoch_end=True, enable_version_counter=False)
    return keep, file if file.is_file() else None


class _Checkpoint(ModelCheckpoint):
    """Lightning's, but that it takes no file's word for which other files there are: it would remove them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
