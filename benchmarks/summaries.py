"""What a summary costs as the archive grows: one changed hour, with few and with many faces stored.

The claim: the same within a factor of 1.5 with 100,000 and with 10 million faces.

    python -m benchmarks.summaries [--faces 100000 --faces 10000000] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
from sqlalchemy import text

from common.models.pipeline import pipeline_spec

#: Faces per hour of the location: the same in every archive, so that what differs is how many hours there are.
PER_HOUR = 1000

FILL = """
INSERT INTO faces (observed_at, job_id, media_object_id, location_id, pipeline_id, x1, y1, x2, y2, size_px, p_face,
                   p_with_mask, p_without_mask, status)
SELECT CAST(:begin AS timestamptz) + n * interval '3.6 seconds', 1, 1, 1, 1, 0, 0, 9, 9, 9, 1, 1, 0, 'with_mask'
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n
"""

#: What was looked at in an hour: a row of each of ten jobs.
LOOKED = """
INSERT INTO frame_counts (job_id, hour, location_id, pipeline_id, frames, seconds)
SELECT 1, CAST(:begin AS timestamptz) + n * interval '1 hour', 1, 1, 100, 0
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n CROSS JOIN generate_series(1, 10)
"""

#: Whose they are is not what is measured.
ONE_JOB = """
WITH source AS (INSERT INTO sources (bucket) VALUES ('s3://archive') RETURNING id), object AS (
    INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id)
    VALUES ('s3://archive', 'a.jpg', 'e', 'e', 1, now(), 'image', 1) RETURNING id
)
INSERT INTO jobs (media_object_id, source_id, pipeline_id, kind, lane, state, finished_at)
SELECT object.id, source.id, 1, 'image', 1, 'succeeded', now() FROM object, source
"""


@click.command()
@click.option("--faces", "sizes", type=int, multiple=True, default=(100_000, 10_000_000), show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(sizes: tuple[int, ...], rounds: int, as_json: bool) -> None:
    """Store faces, then change one hour after another."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    try:
        results = measure(sorted(sizes), rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(f"{result['faces']:>11,} faces  {result['ms']:.1f} ms for a changed hour of {PER_HOUR:,}")
    print(f"{results[-1]['ms'] / results[0]['ms']:.2f} times from the fewest to the most (the claim: 1.5)")


def measure(sizes: list[int], rounds: int) -> list[dict[str, float]]:
    from datetime import UTC, datetime, timedelta

    from common.catalog import places
    from common.cli.parts.deployment import deployment
    from common.database.partitions import ensure_partitions
    from common.database.sessions import engine, session_scope
    from workers.summaries.aggregation import summarize_batch

    begin = datetime(2024, 1, 1, tzinfo=UTC)
    results = []
    with deployment() as settings:
        with session_scope() as session:
            places.add_location(session, "archive", "UTC")
            places.ensure_pipeline(session, pipeline_spec(settings))
            session.execute(text(ONE_JOB))
        stored = 0
        for size in sizes:
            months = [begin + timedelta(days=day) for day in range(size // PER_HOUR // 24 + 40)]
            ensure_partitions(engine(), months)
            with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("SET statement_timeout = 0"))
                connection.execute(
                    text(LOOKED), {"begin": begin, "first": stored // PER_HOUR, "last": size // PER_HOUR - 1}
                )
                while stored < size:
                    last = min(stored + 500_000, size) - 1
                    connection.execute(text(FILL), {"begin": begin, "first": stored, "last": last})
                    stored = last + 1
                connection.execute(text("VACUUM ANALYZE faces"))
            hours = size // PER_HOUR
            took = []
            for number in range(rounds + 1):
                hour = begin + timedelta(hours=(number * 37) % hours)
                with session_scope() as session:
                    session.execute(
                        text("INSERT INTO dirty_marks (location_id, pipeline_id, hour) VALUES (1, 1, :hour)"),
                        {"hour": hour},
                    )
                before = time.perf_counter()
                with session_scope() as session:
                    assert summarize_batch(session, 5000) == (1, 1)
                took.append(time.perf_counter() - before)
            # The first of each finds nothing in memory.
            results.append({"faces": size, "ms": 1000 * statistics.median(took[1:])})
    return results


if __name__ == "__main__":
    main()
