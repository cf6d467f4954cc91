"""`maskwatch demo`: sample footage with known ground truth goes through the real system; it leaves a report and images.

Only the footage is simulated: a bucket on a real S3 server, a real queue, two real workers, a real
database. What was found is compared with the ground truth, and the exit code says whether it was good enough.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import click

from common import ledger
from common.catalog import places
from common.cli.parts import console
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.deployment import deployment
from common.cli.parts.waiting import wait_for
from common.cli.processes import call, work_processes
from common.cli.summary import print_compliance
from common.database.sessions import session_scope
from common.domain import MaskwatchError
from common.local.stack import LocalStack
from common.reporting import queries
from common.reporting.report import write_report
from common.reporting.tables import as_dict
from common.sample.footage import make_footage
from common.sample.ground_truth import (
    Comparison,
    GroundTruth,
    compare_with_ground_truth,
    stored_faces,
    stored_visits,
)
from common.settings import Settings, get_settings

BUCKET = "footage"

#: The share of faces of 32 px and more that must be found, and that must be labelled right.
PROMISED = 0.95

#: What a demo leaves in its folder, and may delete before a new one.
_OWN = ("footage", "annotated", "state", "summary.json", "report.html")


@click.command()
@click.option(
    "--out", "out_dir", default="demo-output", show_default=True, type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results; results of an earlier demo there are replaced.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
@json_option
def demo(out_dir: Path, workers: int, as_json: bool) -> None:
    """See Maskwatch work on this machine alone, without configuration, network or GPU.

    Makes sample footage of two locations and four cameras over two days, one camera with video, puts it into a bucket
    of the embedded S3 server, and analyses it with the real system: producer, Redis, workers, Postgres, aggregator.
    Leaves a report, annotated pictures and a database to query in the folder --out.

    \b
    Example:
      maskwatch demo --out demo-output
    """
    out_dir = out_dir.absolute()
    state_dir = out_dir / "state"
    _clear(out_dir, LocalStack(state_dir))
    _choose_embedded_stack(state_dir)
    summary = _run(out_dir, state_dir, workers)
    (out_dir / "summary.json").write_text(console.as_json(summary) + "\n", encoding="utf-8")
    if as_json:
        print_json(summary)
    else:
        _say_how_to_go_on(out_dir)
    found, right = summary["truth"]["found_share"], summary["truth"]["labelled_right_share"]
    if found < PROMISED or right < PROMISED:
        raise MaskwatchError(
            f"the demo found {found:.1%} of the faces and labelled {right:.1%} right; both must be at least "
            f"{PROMISED:.0%}"
        )


def _choose_embedded_stack(state_dir: Path) -> None:
    """Remove all other settings of this machine from the environment of the demo and of the processes it starts."""
    # The demo shows the embedded stack, whatever else is configured here.
    for name in [name for name in os.environ if name.startswith(("MASKWATCH_", "AWS_")) and name != "AWS_CA_BUNDLE"]:
        del os.environ[name]
    os.environ["MASKWATCH_STATE_DIR"] = str(state_dir)
    # A person waits for the demo, so it ticks more often than a deployment.
    os.environ["MASKWATCH_DISPATCH__INTERVAL_SECONDS"] = "0.5"
    os.environ["MASKWATCH_DISPATCH__RECONCILE_SECONDS"] = "1"
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    get_settings.cache_clear()


def _clear(out_dir: Path, stack: LocalStack) -> None:
    """Remove what an earlier demo left. Raises `MaskwatchError` if the folder holds anything else."""
    if not out_dir.exists():
        return
    strangers = [entry.name for entry in out_dir.iterdir() if entry.name not in _OWN]
    if strangers:
        raise MaskwatchError(
            f"{out_dir} holds files that no demo made ({', '.join(sorted(strangers)[:3])}); name another folder with "
            "--out"
        )
    if (out_dir / "state").exists():
        stack.down(purge=True)
    shutil.rmtree(out_dir)


@dataclass(frozen=True, slots=True)
class _Results:
    """What the database holds when all is analysed."""

    report: Comparison
    rows: Sequence[queries.ComplianceRow]
    failed: Sequence[queries.Quarantined]
    jobs: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "truth": self.report.as_dict(),
            "jobs": self.jobs,
            "compliance_by_day": [as_dict(row) for row in self.rows],
            "quarantined_objects": [asdict(entry) for entry in self.failed],
        }


def _run(out_dir: Path, state_dir: Path, workers: int) -> dict[str, Any]:
    note("1/5  making sample footage with known ground truth")
    ground_truth = make_footage(out_dir / "footage")
    note("2/5  starting Postgres, Redis and an S3 server; uploading the footage")
    with deployment() as settings:
        _analyse(out_dir, state_dir, workers, ground_truth, settings)
        note("4/5  drawing the pictures and the video, writing the report")
        _annotate(out_dir, ground_truth)
        results = _results(out_dir, ground_truth)
    note("5/5  done\n")
    print_compliance(results.rows, "day")
    print_table("Compared with the ground truth", ["", ""], results.report.table())
    print_table("Objects in quarantine", ["object", "reason"], [(entry.uri, entry.reason) for entry in results.failed])
    return results.as_dict()


def _analyse(out_dir: Path, state_dir: Path, workers: int, ground_truth: GroundTruth, settings: Settings) -> None:
    uploaded = _upload(out_dir / "footage" / "bucket", settings.storage.endpoint_url)
    _register(ground_truth)
    with work_processes(workers, state_dir=state_dir):
        note(f"3/5  enqueueing {uploaded} objects; {workers} workers analyse them")
        for camera in ground_truth.cameras:
            call(
                "backfill", f"s3://{BUCKET}/{camera.prefix}", "--location", camera.location,
                "--camera", camera.name, "--time-pattern", camera.time_pattern,
            )  # fmt: skip
        wait_for(settings)


def _annotate(out_dir: Path, ground_truth: GroundTruth) -> None:
    call("annotate", str(out_dir / "footage" / "bucket"), "--out", str(out_dir / "annotated"))
    for video in ground_truth.videos:
        # Two frames a second: to analyse all of them would take a minute.
        name = f"{video.key.split('/')[1]}.mp4"
        source, drawn = out_dir / "footage" / "bucket" / video.key, out_dir / "annotated" / name
        call("annotate", str(source), "--sample-fps", "2", "--out", str(drawn))


def _results(out_dir: Path, ground_truth: GroundTruth) -> _Results:
    with session_scope() as session:
        base = f"s3://{BUCKET}"
        visits = stored_visits(session, base)
        results = _Results(
            compare_with_ground_truth(stored_faces(session, base), ground_truth, counted_visits=visits),
            queries.compliance(session, None, "day"),
            queries.quarantined(session, 100),
            {state.value: count for state, count in ledger.counts_by_state(session).items() if count},
        )
        write_report(session, out_dir / "report.html", images=sorted((out_dir / "annotated").glob("*.jpg")))
    return results


def _upload(folder: Path, endpoint_url: str | None) -> int:
    client = boto3.client("s3", endpoint_url=endpoint_url)
    client.create_bucket(Bucket=BUCKET)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        client.upload_file(str(path), BUCKET, str(path.relative_to(folder)))
    return len(files)


def _register(ground_truth: GroundTruth) -> None:
    with session_scope() as session:
        for camera in ground_truth.cameras:
            location = places.add_location(session, camera.location, camera.time_zone)
            places.add_camera(session, location, camera.name)


def _say_how_to_go_on(out_dir: Path) -> None:
    shown = os.path.relpath(out_dir)
    # Not on the PATH where `make` called it from the project's own environment.
    command = "maskwatch" if shutil.which("maskwatch") else os.path.relpath(Path(sys.executable).with_name("maskwatch"))
    note(
        f"""
Look at    {shown}/report.html     a plot per location
           {shown}/annotated/      pictures and a video: green with mask, red without, with the probability
           {shown}/summary.json    the same for machines

Go on with SQL:
  export MASKWATCH_STATE_DIR={shown}/state
  {command} local psql -c "SELECT * FROM compliance_by_day ORDER BY location, day"
  {command} local psql -c "SELECT camera, status, count(*) FROM face_results GROUP BY 1, 2 ORDER BY 1, 2"
  {command} jobs list --state quarantined
  unset MASKWATCH_STATE_DIR

Your own footage:
  {command} run footage/ --location lobby --time-zone Europe/Berlin"""
    )
