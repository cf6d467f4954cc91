"""How long live footage waits while a backfill keeps all workers busy, whether the backfill still moves, and how long a
small backfill takes that begins behind both.

The claim for the last: at most three times as long as it takes alone, with the same workers.

    python -m benchmarks.lanes [--backlog 4000] [--live 60] [--small 160] [--workers 2] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click

WAITS = """
SELECT extract(epoch FROM a.started_at - j.created_at)::float AS seconds
FROM jobs j JOIN job_attempts a ON a.job_id = j.id WHERE j.lane = 0 AND a.outcome = 'succeeded' ORDER BY 1
"""

DONE = "SELECT count(*) FROM jobs WHERE backfill_id = :id AND state = 'succeeded'"

#: From the beginning of its listing to the end of its last job.
TOOK = """
SELECT extract(epoch FROM max(j.finished_at) - b.started_at)::float
FROM backfills b
JOIN jobs j ON j.backfill_id = b.id
WHERE b.id = :id
GROUP BY b.id
"""


@click.command()
@click.option("--backlog", default=4000, show_default=True, help="Pictures of the backfill.")
@click.option("--live", default=60, show_default=True, help="Pictures that arrive meanwhile, one a second.")
@click.option("--small", default=160, show_default=True, help="Pictures of the small backfill.")
@click.option("--workers", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(backlog: int, live: int, small: int, workers: int, as_json: bool) -> None:
    """Begin a backfill, then let a picture a second arrive at a camera that is polled every second; then begin a
    small backfill, while pictures go on arriving."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    os.environ["MASKWATCH_DISPATCH__POLL_SECONDS"] = "1"
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        del os.environ[name]
    try:
        result = measure(folder, backlog, live, small, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"live footage waited for a worker: median {result['median_s']:.1f} s, 95 % within {result['p95_s']:.1f} s")
    print(
        f"the backfill meanwhile: {result['backfill_per_s']:.1f} pictures per second, {result['left']} left at the end"
    )
    print(
        f"a backfill of {small} pictures: alone {result['alone_s']:.1f} s, behind both {result['behind_s']:.1f} s: "
        f"{result['behind_ratio']:.2f} times as long (the claim: 3)"
    )


def measure(folder: Path, backlog: int, live: int, small: int, workers: int) -> dict[str, float]:
    import boto3
    from sqlalchemy import text

    from benchmarks.end_to_end import BUCKET, enqueue_and_wait, upload
    from common.catalog import places
    from common.cli.parts.deployment import deployment
    from common.cli.processes import work_processes
    from common.database.sessions import session_scope

    with deployment() as settings:
        (prefix,) = upload(folder, settings.storage.endpoint_url, backlog, 1)
        client = boto3.client("s3", endpoint_url=settings.storage.endpoint_url)
        copy(client, prefix, ("alone/", "behind/"), small)
        camera_puts = Camera(client, client.get_object(Bucket=BUCKET, Key=f"{prefix}00000.jpg")["Body"].read())
        with work_processes(workers, state_dir=settings.state_dir):
            # Afterwards the workers have loaded their models.
            enqueue_and_wait("warm-up/")
            with session_scope() as session:
                location = places.add_location(session, "benchmark", "UTC")
                camera = places.add_camera(session, location, "gate")
                places.configure_camera(session, camera, settings, {"source": f"s3://{BUCKET}/live/", "every": "1s"})
            alone = begin("alone/")
            wait_for(lambda session: done(session, alone) == small)
            big = begin(prefix)
            wait_for(lambda session: done(session, big) >= 64)
            with session_scope() as session:
                before = done(session, big)
            began = time.perf_counter()
            for _ in range(live):
                camera_puts.one()
            wait_for(lambda session: len(session.execute(text(WAITS)).all()) == live)
            wall = time.perf_counter() - began
            with session_scope() as session:
                waits = [row.seconds for row in session.execute(text(WAITS))]
                after = done(session, big)
            behind = begin("behind/")
            while not holds(lambda session: done(session, behind) == small):
                camera_puts.one()
            with session_scope() as session:
                seconds = {
                    name: session.execute(text(TOOK), {"id": number}).scalar_one()
                    for name, number in (("alone", alone), ("behind", behind))
                }
                assert done(session, big) < backlog, "the backfill ended before the others did: give more --backlog"
    return {
        "backlog": backlog,
        "live": live,
        "small": small,
        "workers": workers,
        "median_s": waits[len(waits) // 2],
        "p95_s": waits[int(len(waits) * 0.95)],
        "max_s": waits[-1],
        "backfill_per_s": (after - before) / wall,
        "left": backlog - after,
        "alone_s": seconds["alone"],
        "behind_s": seconds["behind"],
        "behind_ratio": seconds["behind"] / seconds["alone"],
    }


class Camera:
    """A camera that puts a picture a second, each of its own bytes."""

    def __init__(self, client: Any, body: bytes) -> None:
        self._client, self._body, self._number = client, body, 0

    def one(self) -> None:
        """Put the next picture, and wait for a second."""
        from benchmarks.end_to_end import BUCKET

        body = self._body + str(self._number).encode()
        self._client.put_object(Bucket=BUCKET, Key=f"live/{self._number:05}.jpg", Body=body)
        self._number += 1
        time.sleep(1)


def copy(client: Any, prefix: str, to: tuple[str, ...], images: int) -> None:
    """The first so many pictures below `prefix`, to each of the others."""
    from benchmarks.end_to_end import BUCKET

    for number in range(images):
        body = client.get_object(Bucket=BUCKET, Key=f"{prefix}{number:05}.jpg")["Body"].read()
        for other in to:
            client.put_object(Bucket=BUCKET, Key=f"{other}{number:05}.jpg", Body=body)


def begin(prefix: str) -> int:
    """Begin a backfill of what lies below `prefix`; returns its number."""
    from benchmarks.end_to_end import BUCKET
    from common.settings import get_settings
    from producer.submit import submit

    return submit(get_settings(), f"s3://{BUCKET}/{prefix}", location_name="benchmark").id


def done(session: Any, backfill: int) -> int:
    """How many jobs of a backfill have succeeded."""
    from sqlalchemy import text

    return int(session.scalar(text(DONE), {"id": backfill}) or 0)


def holds(condition: Any) -> bool:
    from common.database.sessions import session_scope

    with session_scope() as session:
        return bool(condition(session))


def wait_for(condition: Any) -> None:
    for _ in range(3000):
        if holds(condition):
            return
        time.sleep(0.2)
    raise AssertionError("nothing has moved for ten minutes")


if __name__ == "__main__":
    main()
