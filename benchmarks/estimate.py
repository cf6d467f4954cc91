"""What a dry run says against what then happens: jobs, face rows and time.

The claims: jobs and rows within 10 %, time within 30 %. Other footage of the same kind was analysed before.

    python -m benchmarks.estimate [--images 400] [--videos 3] [--workers 2] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import click

BUCKET = "estimate"

JOBS = "SELECT count(*) FROM jobs WHERE backfill_id = :id"
ROWS = "SELECT count(*) FROM faces f JOIN jobs j ON j.id = f.job_id WHERE j.backfill_id = :id"


@click.command()
@click.option("--images", default=400, show_default=True, help="Half as many were analysed before.")
@click.option("--videos", default=3, show_default=True, help="Copies of each sample video; one was analysed before.")
@click.option("--workers", default=2, show_default=True, help="Worker processes; they share the cores.")
@click.option("--json", "as_json", is_flag=True)
def main(images: int, videos: int, workers: int, as_json: bool) -> None:
    """Estimate a backfill, then run it."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        del os.environ[name]
    try:
        result = measure(folder, images, videos, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, claim in (("jobs", 0.1), ("rows", 0.1), ("seconds", 0.3)):
        said, real = result[f"{name}_said"], result[name]
        print(
            f"{name:<8} said {said:,.0f}, then {real:,.0f}: {abs(said - real) / real:.1%} off (the claim: {claim:.0%})"
        )


def measure(folder: Path, images: int, videos: int, workers: int) -> dict[str, float]:
    from sqlalchemy import text

    from common.catalog import places
    from common.cli.parts.deployment import deployment
    from common.cli.parts.waiting import wait_for
    from common.cli.processes import work_processes
    from common.database.sessions import session_scope
    from producer.cli.listing import nudge
    from producer.estimate import estimate
    from producer.submit import submit

    with deployment() as settings:
        upload(folder, settings.storage.endpoint_url, images, videos)
        with session_scope() as session:
            places.add_location(session, "benchmark", "UTC")
        with work_processes(workers, state_dir=settings.state_dir):
            submit(settings, f"s3://{BUCKET}/known/", location_name="benchmark")
            nudge()
            wait_for(settings)
            said = estimate(settings, f"s3://{BUCKET}/new/", location_name="benchmark", workers=workers)
            began = time.perf_counter()
            report = submit(settings, f"s3://{BUCKET}/new/", location_name="benchmark")
            nudge()
            wait_for(settings)
            seconds = time.perf_counter() - began
        with session_scope() as session:
            jobs, rows = (session.scalar(text(query), {"id": report.id}) or 0 for query in (JOBS, ROWS))
    assert said.jobs is not None and said.face_rows is not None and said.hours is not None
    return {
        "jobs_said": said.jobs,
        "jobs": jobs,
        "rows_said": said.face_rows,
        "rows": rows,
        "seconds_said": 3600 * said.hours,
        "seconds": seconds,
    }


def upload(folder: Path, endpoint_url: str | None, images: int, videos: int) -> None:
    """Sample footage: what is known before, and what is new."""
    import boto3

    from common.sample.footage import make_footage

    make_footage(folder / "footage")
    files = sorted((folder / "footage" / "bucket").rglob("*"))
    whole = [path.read_bytes() for path in files if path.suffix == ".jpg"]
    whole = [content for content in whole if content.endswith(b"\xff\xd9")]
    client = boto3.client("s3", endpoint_url=endpoint_url)
    client.create_bucket(Bucket=BUCKET)
    for prefix, count, copies in (("known/", images // 2, 1), ("new/", images, videos)):
        for number in range(count):
            client.put_object(Bucket=BUCKET, Key=f"{prefix}{number:05}.jpg", Body=whole[number % len(whole)])
        for path in files:
            if path.suffix in (".mp4", ".mkv"):
                for number in range(copies):
                    client.put_object(Bucket=BUCKET, Key=f"{prefix}{number}/{path.name}", Body=path.read_bytes())


if __name__ == "__main__":
    main()
