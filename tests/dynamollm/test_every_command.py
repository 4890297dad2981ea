"""Every command, walked by the command line's own tree: each explains itself, refuses what it does not know, and fails
in a sentence. A command added tomorrow is tested tomorrow."""

import json
import re
import socket
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from dynamollm.cli import group
from dynamollm.errors import UserError

LIMIT = 100  # characters of a line of help that still read well


def walk(command, path=()):
    """Every command with its path; groups among them."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), (*path, name))


EVERY = list(walk(group))
PLAIN = [(path, command) for path, command in EVERY if not isinstance(command, click.Group)]


def named(commands):
    return [pytest.param(path, command, id=" ".join(path) or "dynamollm") for path, command in commands]


def run(*arguments, **environ):
    return CliRunner().invoke(group, list(arguments), env=environ)


@pytest.fixture
def nobody():
    """A URL where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize(("path", "command"), named(EVERY))
class TestEach:
    def test_explains_itself(self, path, command):
        told = run(*path, "--help")
        assert told.exit_code == 0
        assert told.output.startswith("Usage: ")
        assert command.help, "no docstring"
        assert command.help[0].isupper()
        first = command.help.splitlines()[0]
        assert first.endswith((".", ":")), first
        assert max(map(len, told.output.splitlines())) <= LIMIT

    def test_every_option_says_what_it_does_or_speaks_for_itself(self, path, command):
        silent = {"--host", "--port", "--api", "--format"}
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden and not silent & set(option.opts):
                assert option.help, f"{' '.join(path)} {option.opts[0]} has no help"

    def test_an_unknown_option_is_refused_with_the_usage(self, path, command):
        told = run(*path, "--no-such-option")
        assert told.exit_code == 2
        assert "No such option" in told.output


@pytest.mark.parametrize(("path", "command"), named(PLAIN))
def test_a_required_option_that_lacks_is_named(path, command):
    required = [p for p in command.params if p.required]
    if not required:
        return
    told = run(*path)
    assert told.exit_code == 2
    assert any(option in told.output for p in required for option in (*p.opts, p.make_metavar(click.Context(command))))


ASKING = [(path, command) for path, command in PLAIN if any("--url" in p.opts for p in command.params)]


@pytest.mark.parametrize(("path", "command"), named(ASKING))
def test_a_gateway_that_is_not_there_is_told_in_a_sentence(path, command, nobody, tmp_path):
    if path[0] in ("doctor", "controller"):
        pytest.skip("it does not end, or says so in its table: tested where it is")
    needed = {"replay": ["--trace", "synthetic-conv", "--limit", "1"]}
    more = needed.get(path[0], [])
    for parameter in command.params:
        if parameter.required and not set(parameter.opts) & {*more, "--url"}:
            pytest.skip(f"{parameter.opts[0]} needs an engine of its own; tested where that is")
    told = run(*path, "--url", nobody, *more)
    assert isinstance(told.exception, UserError), told.exception  # `main` prints its message and exits with 2
    assert "\n" not in str(told.exception).strip()


def test_an_unknown_command_is_told_the_nearest():
    told = run("serv")
    assert told.exit_code == 2
    assert "serve" in told.output


def test_h_is_help_below_the_group_too():
    command = [sys.executable, "-m", "dynamollm", "config", "show"]  # click keeps what it was first asked with
    told = [
        subprocess.run([*command, flag], capture_output=True, text=True, check=True).stdout for flag in ("-h", "--help")
    ]
    assert told[0] == told[1] != ""


def test_the_version_is_the_packages():
    told = run("--version")
    assert told.exit_code == 0
    assert re.search(r"\d+\.\d+", told.output)


def test_every_command_is_in_the_overview():
    overview = run("--help").output
    for path, _ in PLAIN:
        assert path[0] in overview


def test_commands_that_print_json_print_nothing_else():
    told = run("config", "schema")
    assert json.loads(told.output)["title"] == "Settings"
