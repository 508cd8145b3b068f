"""Ends a job on several nodes when one of its processes is gone.

A process that waits for another in a collective cannot tell one that is gone from one that is busy: the first process
alone trains, for hours. So every process has a connection to the first, over which a thread says every second that it
lives. A process whose connection breaks, or that is silent for too long, ends the job in all others.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from pattern_bench.errors import UserError
from pattern_bench.processes import collectives, signals
from pattern_bench.processes.launch import tells

SECONDS_FOR_OTHERS = 1.0
"""For processes that were lost together to be noticed together."""
SECONDS_TO_NOTICE = 0.3
"""For a process that ends for another reason to notice that one was lost."""


@dataclass
class _Peer:
    """Another process: its machine's name, when it was heard last, and what of its next line has come."""

    link: socket.socket
    node: str
    heard: float = field(default_factory=time.monotonic)
    begun: bytes = b""


@contextmanager
def watched(lost_after: float) -> Iterator[None]:
    """Within, a process of the job that is lost ends this one, with one error for all.

    Args:
        lost_after: seconds of silence after which a process counts as lost.

    Raises:
        UserError: where the processes cannot reach each other.
    """
    watch = _Watch(lost_after)
    watch.thread.start()
    try:
        yield
    except signals.Stopped as stop:
        watch.leave(f"over {stop.number}")
        raise
    except BaseException:
        watch.leave("over 0")
        raise
    watch.leave("bye")


class _Watch:
    def __init__(self, lost_after: float) -> None:
        self.lost_after = lost_after
        self.peers = _connected(lost_after)
        self.gone: set[int] = set()
        self.left = False
        self.telling = threading.Lock()
        self.told = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def leave(self, word: str) -> None:
        """Close the connections. Where another process was lost, this one ends in here."""
        self.left = True
        self.thread.join()
        # A launcher that has lost its own connection, or an exchange that was cut, may be heard of before the process
        # that was lost.
        until = time.monotonic() + SECONDS_TO_NOTICE
        while word != "bye" and self.peers and not self.gone and (left := until - time.monotonic()) > 0:
            self._listen(left)
        if self.gone:
            self._lost("ended without a word")
        for peer in self.peers.values():
            _say(peer, word)
            peer.link.close()

    def _run(self) -> None:
        pause = min(1.0, self.lost_after / 10)
        said = 0.0
        while self.peers and not self.left:
            if time.monotonic() - said >= pause:
                said = time.monotonic()
                for peer in self.peers.values():
                    _say(peer, "here")
            self._listen(0.1)
            silent = [n for n, peer in self.peers.items() if time.monotonic() - peer.heard > self.lost_after]
            if silent:
                self._lost(f"not answered for {self.lost_after:g} s (trainer.lost_after)")
            if self.gone:
                self._lost("ended without a word")

    def _listen(self, seconds: float) -> None:
        """Read what the others say in ``seconds``, or until one of them says something."""
        poll = select.poll()
        numbers = {peer.link.fileno(): number for number, peer in self.peers.items() if number not in self.gone}
        for file in numbers:
            poll.register(file, select.POLLIN)
        for file, _ in poll.poll(1000 * seconds):
            number = numbers[file]
            peer = self.peers[number]
            try:
                come = peer.link.recv(4096)
            except OSError:
                come = b""
            if not come:
                self.gone.add(number)
                continue
            peer.heard = time.monotonic()
            *lines, peer.begun = (peer.begun + come).split(b"\n")
            for word, _, which in (line.decode().partition(" ") for line in lines):
                if word == "bye" or (word == "over" and self.left):
                    del self.peers[number]
                elif word == "over" and not self.gone:
                    self._over(number, int(which))

    def _lost(self, how: str) -> NoReturn:
        """Report the processes that were lost, and end this one."""
        speaks = collectives.is_rank_zero() or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
        # A launcher that has lost its own connection ends this process meanwhile.
        signals.last_acts.add(lambda: self._tell(how) if speaks else None)
        until = time.monotonic() + SECONDS_FOR_OTHERS
        while (left := until - time.monotonic()) > 0:
            self._listen(left)
        recent = time.monotonic() - max(self.lost_after / 2, SECONDS_FOR_OTHERS)
        self.gone |= {number for number, peer in self.peers.items() if peer.heard < recent}
        for number, peer in self.peers.items():
            if number not in self.gone:
                _say(peer, "over 0")
        if not speaks:
            time.sleep(SECONDS_FOR_OTHERS)  # the launcher ends all of a node when one ends
        signals.end_at_once(1)

    def _tell(self, how: str) -> None:
        with self.telling:  # whoever comes second ends the process, and waits for that
            if not self.told and tells():
                os.write(2, f"error: {self._message(how)}\n".encode())
            self.told = True

    def _message(self, how: str) -> str:
        nodes: dict[str, list[str]] = {}
        for number in sorted(self.gone):
            nodes.setdefault(self.peers[number].node, []).append(str(number))
        lost = " and ".join(f"process {', '.join(numbers)} on {node}" for node, numbers in nodes.items())
        return (
            f"lost {lost}, of {collectives.world_size()} processes: {how}. What was kept is there: "
            "start again with resume=DIR"
        )

    def _over(self, number: int, stopped_by: int) -> None:
        """End this process as another has ended, which has reported why."""
        for other, peer in self.peers.items():
            if other != number:
                _say(peer, f"over {stopped_by}")
        self.left = True
        if stopped_by in signals.OBEYED:
            os.kill(os.getpid(), stopped_by)
        else:
            time.sleep(SECONDS_FOR_OTHERS)  # one that fails for the same reason takes leave by itself
            signals.end_at_once(1)


def _connected(patience: float) -> dict[int, _Peer]:
    """The first process in all others; and all others in the first."""
    if collectives.is_rank_zero():
        server = socket.create_server(("", 0))
        server.settimeout(patience)
    place = collectives.broadcast_text(
        f"{_own_address()} {server.getsockname()[1]} {_name()}" if collectives.is_rank_zero() else ""
    )
    host, port, name = place.split(" ", 2)
    found: dict[int, _Peer] = {}
    try:
        if not collectives.is_rank_zero():
            link = socket.create_connection((host, int(port)), patience)
            link.sendall(f"{collectives.rank()} {_name()}\n".encode())
            found[0] = _Peer(link, name)
        while collectives.is_rank_zero() and len(found) < collectives.world_size() - 1:
            link, _ = server.accept()
            link.settimeout(patience)
            with link.makefile("rb", buffering=0) as lines:
                number, _, node = lines.readline().decode().strip().partition(" ")
            found[int(number)] = _Peer(link, node)
    except (OSError, ValueError) as error:
        raise UserError(
            f"process {collectives.rank()} on {_name()} cannot reach the first process at {host}:{port} ({error}): let "
            "the machines reach each other at all ports"
        ) from error
    for peer in found.values():
        peer.link.setblocking(False)
    if collectives.is_rank_zero():
        server.close()
    return found


def _own_address() -> str:
    """Of this process, as others can reach it: as the name that they all know where it leads here, else as the address
    from which this machine reaches that."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with socket.create_connection((host, port)) as link:
        here, there = link.getsockname()[0], link.getpeername()[0]
    return host if here == there else here


def _name() -> str:
    return socket.gethostname()


def _say(peer: _Peer, word: str) -> None:
    with suppress(OSError):  # one that is gone is noticed where it is listened to
        peer.link.send(f"{word}\n".encode())
