"""How much room the ledger and its faces take in Postgres: bytes per row, indexes included.

`python -m benchmarks.storage` fills an embedded database of its own and prints a table. Sizes, no times.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, create_engine, text

import migrations
from common.database.partitions import ensure_partitions
from common.local.stack import LocalStack

FACES, IMAGES = 300_000, 100_000

_FILL = (
    "INSERT INTO locations (name, time_zone) VALUES ('lobby', 'UTC')",
    "INSERT INTO pipelines (fingerprint, detector, classifier, spec) VALUES ('f', 'd', 'c', '{}')",
    "INSERT INTO sources (bucket) VALUES ('s3://footage')",
    # Keys and ETags as long as those of a camera that puts a picture each few seconds.
    "INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id, observed_at,"
    " observed_at_source) SELECT 's3://footage', 'door/2026/03/02/' || lpad(n::text, 12, '0') || '.jpg', md5(n::text),"
    " md5(n::text), 200000, '2026-03-02', 'image', 1, '2026-03-01'::timestamptz + n * interval '20 s', 'key_pattern'"
    " FROM generate_series(1, :images) n",
    # Each is written three times more on its way: sent, claimed, ended.
    "INSERT INTO jobs (media_object_id, source_id, pipeline_id, kind, lane, state) SELECT id, 1, 1, 'image', 1,"
    " 'pending' FROM media_objects",
    "UPDATE jobs SET state = 'queued', queued_at = now(), epoch = md5('e')",
    "UPDATE jobs SET state = 'running', worker = 'worker-1@host/' || gen_random_uuid(), lease_until = now()",
    "UPDATE jobs SET state = 'succeeded', worker = NULL, lease_until = NULL, finished_at = now()",
    "INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at) SELECT id, 1, 'succeeded',"
    " 'worker-1@host/' || gen_random_uuid(), now() FROM jobs",
    "INSERT INTO frame_counts (job_id, hour, location_id, pipeline_id, frames, seconds)"
    " SELECT id, '2026-03-02', 1, 1, 1, 0 FROM jobs",
    "INSERT INTO faces (observed_at, job_id, media_object_id, location_id, pipeline_id, x1, y1, x2, y2, size_px,"
    " p_face, p_with_mask, p_without_mask, status)"
    " SELECT '2026-03-01'::timestamptz + n * interval '8 s', n / 3 + 1, n / 3 + 1, 1, 1, 100.5,"
    " 100.5, 150.5, 160.5, 60, 0.9, 0.9, 0.1, 'with_mask'"
    " FROM generate_series(1, :faces) n",
)

TABLES = ("media_objects", "jobs", "job_attempts", "frame_counts")


def size(connection: Connection, table: str) -> int:
    """Bytes of a table with its indexes."""
    return int(connection.execute(text("SELECT pg_total_relation_size(:table)"), {"table": table}).scalar_one())


def main() -> None:
    """Fill the tables and print the table."""
    with tempfile.TemporaryDirectory() as folder, LocalStack(Path(folder) / "state").session() as endpoints:
        engine = create_engine(endpoints.database_url)
        migrations.upgrade(engine)
        ensure_partitions(engine, [datetime(2026, 3, 5, tzinfo=UTC)])
        with engine.begin() as connection:
            for statement in _FILL:
                connection.execute(text(statement), {"images": IMAGES, "faces": FACES})
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
            print("| table | bytes a row |\n|---|---|")
            print(f"| faces | {size(connection, 'faces_2026_03') / FACES:.0f} |")
            for table in TABLES:
                # As it is after a while: the room of older versions of rows is used again.
                if table == "jobs":
                    connection.execute(text("VACUUM FULL jobs"))
                print(f"| {table} | {size(connection, table) / IMAGES:.0f} |")
        engine.dispose()


if __name__ == "__main__":
    main()
