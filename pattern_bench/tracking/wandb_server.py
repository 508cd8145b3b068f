"""W&B's server: whether it can be reached, and the results that the runs of a project left there."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import ParseResult, urlparse
from urllib.request import getproxies, proxy_bypass

from pattern_bench.errors import UserError

log = logging.getLogger(__name__)
CONNECT_SECONDS = 2.0
"""For a connection to the server, before a run is logged offline."""
RESULTS = "results"
"""The folder of a W&B run's files that holds those of the run's folder."""


def _server() -> ParseResult:
    """The address of W&B's server: the environment's, or that which ``wandb login --host`` left."""
    import wandb
    from pydantic import ValidationError

    try:
        return urlparse(wandb.setup(wandb.Settings(silent=True)).settings.base_url)
    except ValidationError as error:  # without the values: an address may hold a password
        wrong = [f"WANDB_{'_'.join(map(str, each['loc'])).upper()} ({each['msg']})" for each in error.errors()]
        raise UserError(f"not possible: {', '.join(wrong)}: mend it, or give logger=csv") from error


def _has_key(server: ParseResult) -> bool:
    """Whether W&B will find a key, rather than ask for one."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import read_netrc_auth

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return read_netrc_auth(host=server.geturl()) is not None
    except AuthenticationError:  # W&B will say what is wrong with it
        return True


def reachable() -> bool:
    """Whether there is a key for W&B's server, and it or the proxy before it answers; never asks, and waits
    ``CONNECT_SECONDS`` at most."""
    server = _server()
    host = server.hostname or ""
    if not _has_key(server):
        return False
    proxy = None if proxy_bypass(host) else getproxies().get(server.scheme)
    way = urlparse(proxy) if proxy else server
    address = (way.hostname or "", way.port or (443 if way.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection(address, CONNECT_SECONDS).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)  # where there is no network, finding the address may take longer
    if not answered.is_set():
        log.warning("W&B at %s does not answer: logging offline, into the run's folder", host)
    return answered.is_set()


def download(project: str, into: Path) -> list[Path]:
    """Fetches what the finished runs of a W&B project left, through W&B's public API.

    Args:
        project: ``ENTITY/PROJECT``.
        into: each run's files come into ``into/RUN_ID/results``; those of an earlier download are replaced.

    Returns:
        The folders ``into/RUN_ID``, in the order in which the runs were created. Runs that left no results are named in
        the log.

    Raises:
        UserError: where the project is not one, there is no key, the server does not answer, it knows no such project
            or no finished run with results, or it names a file that would lie elsewhere.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
        raise UserError(f"{project} is no W&B project: give ENTITY/PROJECT")
    server = _server()
    host = server.hostname or ""
    if not _has_key(server):
        raise UserError(f"the W&B project {project} needs a key for {host}: run wandb login, or set WANDB_API_KEY")
    if not reachable():
        raise UserError(f"the W&B project {project} cannot be read, since {host} does not answer: try again later")
    import wandb

    found, without = [], []
    try:
        for run in wandb.Api().runs(project, filters={"state": "finished"}):
            files = [file for file in run.files(pattern=f"{RESULTS}/%") if file.name.startswith(f"{RESULTS}/")]
            for name in (run.id, *(file.name.removeprefix(f"{RESULTS}/") for file in files)):
                if not re.fullmatch(r"\w[\w.-]*", name):
                    raise UserError(f"the W&B project {project} has a file {name!r} that {into} cannot hold: remove it")
            # The summary last: a folder that has one is complete.
            for file in sorted(files, key=lambda file: file.name == f"{RESULTS}/summary.json"):
                file.download(str(into / run.id), replace=True).close()
            if files:
                found.append(into / run.id)
            else:
                without.append(f"{run.name} ({run.id})")
    except (wandb.errors.Error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"the W&B project {project} cannot be read ({said}): is it the right one, and yours?"
        ) from error
    if without:
        log.warning("%d runs of %s left no results: %s", len(without), project, ", ".join(without))
    if not found:
        raise UserError(f"the W&B project {project} holds no finished run with results: run the job first")
    return found
