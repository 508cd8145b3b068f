"""The entry of all commands: which errors are one line, and which a traceback."""

import pytest

from pattern_bench.commands import entry
from pattern_bench.commands.entry import run_command
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
