"""The `maskwatch` command. Sub-commands are named here and loaded when they are called,
so that `maskwatch status` imports no model and a producer needs no decoder."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

import click

from common import __version__

#: Command name → where it lives and the line that `maskwatch --help` shows, in the order people need them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("common.cli.demo:demo", "See it work: sample footage through the whole system."),
    "run": ("common.cli.run:run", "Analyse pictures and videos on this machine, and print a compliance table."),
    "backfill": ("producer.cli.backfill:backfill", "Enqueue a bucket prefix or a folder."),
    "backfills": ("producer.cli.backfills:backfills", "Show the progress of backfills; pause, resume or cancel one."),
    "summary": ("common.cli.summary:summary", "Compliance per location by hour, day or week."),
    "coverage": ("common.cli.coverage:coverage", "Which footage of a camera was analysed, and what is missing."),
    "report": ("common.cli.report:report", "Write a report.html with a plot per location."),
    "status": ("common.cli.status:status", "Jobs by state, queue lengths, and what is still to do."),
    "jobs": ("common.cli.jobs:jobs", "List, show, retry, cancel or rerun jobs."),
    "sources": ("common.cli.sources:sources", "Buckets and folders of footage, and whether one is paused."),
    "locations": ("common.cli.locations:locations", "Add or list locations and their time zones."),
    "cameras": ("common.cli.cameras:cameras", "Add, change, correct, switch off or list cameras."),
    "pipelines": ("common.cli.pipelines:pipelines", "List pipelines (pinned models and settings), promote one."),
    "annotate": (
        "workers.cli.annotate:annotate",
        "Draw the faces of pictures or a video, green with mask, red without.",
    ),
    "summarize": ("workers.cli.summarize:summarize", "Bring the hourly summaries up to date now."),
    "worker": ("workers.cli.worker:worker", "Run a worker that analyses pictures and videos."),
    "aggregator": ("workers.cli.aggregator:aggregator", "Run a worker that only builds summaries."),
    "producer": ("producer.cli.producer:producer", "Run the dispatcher and the reconciler."),
    "purge": ("workers.cli.purge:purge", "Remove the faces seen before a date; the summaries stay."),
    "erase": ("workers.cli.purge:erase", "Remove everything that came from an object."),
    "local": ("common.cli.local:local", "The embedded Postgres, Redis and S3 of this machine."),
    "db": ("common.cli.database:db", "Migrate the database, and grant rights on it."),
    "train": ("workers.cli.train:train", "Fit and export a classifier."),
    "evaluate": ("workers.cli.evaluate:evaluate", "Measure detection and classification on labelled data."),
    "models": ("workers.cli.models:models", "List, download, verify, export and import model files."),
    "doctor": ("common.cli.doctor:doctor", "Check what is configured, reachable and installed."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use (pattern from click's documentation on lazy loading)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Click suggests from the commands that a group holds, and this one holds none until they are used.
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Written from the table, so that --help imports none of the commands.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Maskwatch counts faces with and without mask in pictures and videos, per location and hour.

    \b
    First steps:
      maskwatch demo                                      see everything work on sample footage
      maskwatch run footage/ --location lobby             analyse your own pictures and videos
      maskwatch backfill s3://footage/2026/ --location lobby --wait
    """


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point: errors that a person can put right become one line and a non-zero exit."""
    # A process that is asked to stop first stops what it has started. (Workers replace these by Celery's handlers.)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        cli(standalone_mode=True)
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # Imported here: --help and commands that succeed have nothing to explain.
        from common.cli.errors import tell

        exit_code = tell(error)
        if exit_code is None:
            raise
        sys.exit(exit_code)
