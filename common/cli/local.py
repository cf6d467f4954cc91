"""The `maskwatch local` commands: the embedded Postgres, Redis and S3 of this machine."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from dataclasses import asdict

import click

from common.cli.parts.console import json_option, note, print_json, print_table
from common.local.postgres import psql_command
from common.local.stack import LocalStack, ServiceStatus
from common.settings import get_settings

#: Exit code of `status` if a service doesn't run.
NOT_RUNNING = 3


@click.group()
def local() -> None:
    """The embedded Postgres, Redis and S3 server of this machine.

    They need no installation and no root, and live in one folder: MASKWATCH_STATE_DIR, or .maskwatch in the current
    folder. Commands start them by themselves if no database, broker or bucket is configured, and stop them again;
    `up` keeps them running.

    \b
    Postgres keeps its data when it stops; `down --purge` removes it.
    Redis starts empty: Postgres holds the jobs, and they are queued again.
    S3 keeps its objects in memory: they are gone when it stops.

    The S3 server checks no credentials: every user of this machine can reach it. Keep nothing secret in it.
    """


@local.command()
@click.option("--show-env", is_flag=True, help="Print `export` lines for other tools. They contain the password.")
@json_option
def up(show_env: bool, as_json: bool) -> None:
    """Start the services and keep them running.

    Services that run already are left as they are. Stop them with `maskwatch local down`.

    \b
    maskwatch local up
    eval "$(maskwatch local up --show-env)"     use the services from other tools, too
    """
    stack = _stack()
    endpoints = stack.up()
    services = stack.status()
    if as_json:
        environment = {"environment": endpoints.environment()} if show_env else {}
        print_json({"state_dir": str(stack.state_dir), "services": [asdict(s) for s in services], **environment})
    elif show_env:
        for name, value in endpoints.environment().items():
            click.echo(f"export {name}={shlex.quote(value)}")
    else:
        _print(services)
        note(f"Running from {stack.state_dir}. Stop with: maskwatch local down")


@local.command()
@click.option("--purge", is_flag=True, help="Remove the database and all other state, too, for good.")
def down(purge: bool) -> None:
    """Stop everything that runs in the state directory, even if another command is using it.

    To remove a state directory, use --purge and don't delete it by hand: for root, Postgres keeps its data outside, in
    /var/lib/maskwatch, because it has to run as another user.

    \b
    maskwatch local down
    maskwatch local down --purge
    """
    stack = _stack()
    stack.down(purge=purge)
    note(f"Stopped; {stack.state_dir} {'is removed' if purge else 'keeps the data'}.")


@local.command()
@json_option
def status(as_json: bool) -> None:
    """Show which services run, and where. Exits with 3 if one doesn't run.

    \b
    maskwatch local status
    maskwatch local status --json
    """
    services = _stack().status()
    if as_json:
        print_json([asdict(service) for service in services])
    else:
        _print(services)
    if not all(service.running for service in services):
        sys.exit(NOT_RUNNING)


@local.command(
    # Options go to psql as they are, so that -h here is psql's.
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[PSQL ARGUMENTS]...")
def psql(arguments: tuple[str, ...]) -> None:
    """Open psql on the embedded database, or run one query.

    \b
    maskwatch local psql
    maskwatch local psql -c 'SELECT count(*) FROM faces'
    """
    with _stack().session() as endpoints:
        argv, environment = psql_command(endpoints.database_url)
        # Ctrl-C belongs to psql, where it cancels the query.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = subprocess.run([*argv, *arguments], env=environment, check=False).returncode
        finally:
            signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _stack() -> LocalStack:
    return LocalStack(get_settings().state_dir)


def _print(services: list[ServiceStatus]) -> None:
    rows = [(s.name, "running" if s.running else "stopped", s.pid, s.address) for s in services]
    print_table("", ("service", "state", "pid", "address"), rows)
