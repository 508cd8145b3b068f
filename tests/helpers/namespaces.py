"""Two hosts on this machine: network namespaces with names and addresses of their own, joined by a cable."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NODES = ("hosta", "hostb")


def why_not():
    """What is missing here for hosts of one's own; None where nothing is."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        return "network namespaces need iproute2, util-linux and hostname"
    name = f"pbtry{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Hosts:
    """Starts commands on the two hosts, and pulls the cable between them."""

    def __init__(self):
        if (missing := why_not()) is not None:
            pytest.skip(missing)
        self.spaces = [f"pb{os.getpid()}{letter}" for letter in "ab"]
        self.folders = [Path("/etc/netns") / space for space in self.spaces]

    def __enter__(self):
        one, other = self.spaces
        for space in self.spaces:
            ip("netns", "add", space)
        ip("link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
        for number, (space, folder) in enumerate(zip(self.spaces, self.folders, strict=True), 1):
            folder.mkdir(parents=True)  # ``ip netns exec`` mounts what is in there over /etc
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 hosta\n10.77.0.2 hostb\n")
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", space)
            ip("-n", space, "link", "set", space, "up")
            ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for space, folder in zip(self.spaces, self.folders, strict=True):
            subprocess.run(["ip", "netns", "del", space], check=False)
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, number, command, **how):
        """A command on host 0 or 1, in whose end all ends that it started there."""
        inside = f'hostname {NODES[number]}; exec "$@"'
        host = ["ip", "netns", "exec", self.spaces[number], "unshare", "--uts", "--pid", "--fork", "--kill-child"]
        return subprocess.Popen([*host, "--mount-proc", "sh", "-c", inside, "sh", *command], **how)

    def pull_the_cable(self):
        ip("-n", self.spaces[1], "link", "set", self.spaces[1], "down")

    def put_the_cable_back(self):
        ip("-n", self.spaces[1], "link", "set", self.spaces[1], "up")

    def processes(self):
        """What still runs on the hosts."""
        listed = [subprocess.check_output(["ip", "netns", "pids", space], text=True) for space in self.spaces]
        return " ".join(listed).split()


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)
