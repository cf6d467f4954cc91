"""How long live footage waits while a backfill keeps all workers busy, and whether the backfill still moves.

python -m benchmarks.lanes [--backlog 2000] [--live 60] [--workers 2] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import click

WAITS = """
SELECT extract(epoch FROM a.started_at - j.created_at)::float AS seconds
FROM jobs j JOIN job_attempts a ON a.job_id = j.id WHERE j.lane = 0 AND a.outcome = 'succeeded' ORDER BY 1
"""

DONE = "SELECT count(*) FROM jobs WHERE lane = 1 AND state = 'succeeded'"


@click.command()
@click.option("--backlog", default=2000, show_default=True, help="Pictures of the backfill.")
@click.option("--live", default=60, show_default=True, help="Pictures that arrive meanwhile, one a second.")
@click.option("--workers", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(backlog: int, live: int, workers: int, as_json: bool) -> None:
    """Begin a backfill, then let a picture a second arrive at a camera that is looked at every second."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    os.environ["MASKWATCH_DISPATCH__LOOK_SECONDS"] = "1"
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        del os.environ[name]
    try:
        result = measure(folder, backlog, live, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"live footage waited for a worker: median {result['median_s']:.1f} s, 95 % within {result['p95_s']:.1f} s")
    print(
        f"the backfill meanwhile: {result['backfill_per_s']:.1f} pictures per second, {result['left']} left at the end"
    )


def measure(folder: Path, backlog: int, live: int, workers: int) -> dict:  # type: ignore[type-arg]
    import boto3
    from sqlalchemy import text

    from benchmarks.road import BUCKET, upload
    from common.catalog import places
    from common.cli.parts.deployment import deployment
    from common.cli.processes import crew
    from common.database.sessions import session_scope
    from producer.submit import submit

    with deployment() as settings:
        (prefix,) = upload(folder, settings.storage.endpoint_url, backlog, 1)
        client = boto3.client("s3", endpoint_url=settings.storage.endpoint_url)
        body = client.get_object(Bucket=BUCKET, Key=f"{prefix}00000.jpg")["Body"].read()
        with session_scope() as session:
            location = places.add_location(session, "benchmark", "UTC")
            camera = places.add_camera(session, location, "gate")
            places.configure_camera(session, camera, settings, {"source": f"s3://{BUCKET}/live/", "every": "1s"})
        with crew(workers, state_dir=settings.state_dir):
            submit(settings, f"s3://{BUCKET}/{prefix}", location_name="benchmark")
            wait_for(lambda session: session.scalar(text(DONE)) >= 64)
            with session_scope() as session:
                before = session.scalar(text(DONE)) or 0
            began = time.perf_counter()
            for number in range(live):
                client.put_object(Bucket=BUCKET, Key=f"live/{number:05}.jpg", Body=body + str(number).encode())
                time.sleep(1)
            wait_for(lambda session: len(session.execute(text(WAITS)).all()) == live)
            wall = time.perf_counter() - began
            with session_scope() as session:
                waits = [row.seconds for row in session.execute(text(WAITS))]
                done = (session.scalar(text(DONE)) or 0) - before
            assert before + done < backlog, "the backfill ended before the live footage did: give more --backlog"
    return {
        "backlog": backlog,
        "live": live,
        "workers": workers,
        "median_s": waits[len(waits) // 2],
        "p95_s": waits[int(len(waits) * 0.95)],
        "max_s": waits[-1],
        "backfill_per_s": done / wall,
        "left": backlog - before - done,
    }


def wait_for(condition: object) -> None:
    from common.database.sessions import session_scope

    assert callable(condition)
    for _ in range(3000):
        with session_scope() as session:
            if condition(session):
                return
        time.sleep(0.2)
    raise AssertionError("the road does not move")


if __name__ == "__main__":
    main()
