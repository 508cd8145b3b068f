"""Which of the processes that torchrun or srun started says what ended the job: what all know is to be said once."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from pattern_bench.launch import number_from_outside

SECONDS = 1.0


def tells() -> bool:
    """Whether this process is the first of the job to ask. One that cannot reach the others tells, too."""
    if number_from_outside() is None:
        return True
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return True
    try:
        # The store's own attempts to connect leave warnings.
        socket.create_connection((host, int(port)), SECONDS).close()
        from torch.distributed import TCPStore

        store = TCPStore(host, int(port), timeout=timedelta(seconds=SECONDS), wait_for_workers=False)
        return store.add(f"pattern_bench/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (OSError, ValueError, RuntimeError):
        return True
