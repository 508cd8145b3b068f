"""The entry of all commands: which errors are one line, and which a traceback."""

import subprocess
import sys

import pytest

from pattern_bench.commands import entry
from pattern_bench.commands.entry import run_command, say
from pattern_bench.errors import UserError


def failing(error):
    def body():
        raise error

    return body


def explain(error):
    return "explained" if isinstance(error, OSError) else None


def test_a_command_that_ends_well_returns():
    done = []
    run_command(lambda: done.append(1))
    assert done == [1]


@pytest.mark.parametrize(("error", "said"), [
    (UserError("seed=x is not possible"), "error: seed=x is not possible"),
    (UserError("Caught UserError in DataLoader worker\n  pattern_bench.errors.UserError: a.jpg cannot be read\n"),
     "error: a.jpg cannot be read"),
    (OSError(28, "No space left on device"), "error: explained"),
])  # fmt: skip
def test_mistakes_are_one_line(error, said):
    with pytest.raises(SystemExit) as ended:
        run_command(failing(error), explain)
    assert ended.value.code == said


def test_of_several_processes_one_writes_the_line(monkeypatch):
    monkeypatch.setattr(entry, "tells", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run_command(failing(UserError("seed=x is not possible")))
    assert ended.value.code == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), SystemExit(143)])
def test_what_is_no_mistake_of_the_users_is_raised(error):
    with pytest.raises(type(error)) as raised:
        run_command(failing(error), explain)
    assert raised.value is error


def test_without_an_explanation_only_user_errors_are_one_line():
    with pytest.raises(OSError, match="No space"):
        run_command(failing(OSError(28, "No space left on device")))


@pytest.mark.parametrize(("how", "why"), [
    ("say('results: r', 'the run in r is complete')", "; the run in r is complete"), ("print('x' * 99999)", ""),
])  # fmt: skip
def test_a_full_standard_output_is_named_and_nothing_else(how, why):
    code = f"from pattern_bench.commands.entry import *; run_command(lambda: {how}, lambda error: 'the folder')"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    said = f"error: standard output cannot be written (No space left on device): send it elsewhere{why}\n"
    assert (ended.returncode, ended.stderr) == (1, said)


def test_a_closed_standard_output_is_named(monkeypatch, capsys):
    say("seen")
    assert capsys.readouterr().out == "seen\n"
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UserError, match=r"^standard output cannot be written \(it is closed\): send .*; done$"):
        say("unseen", "done")
