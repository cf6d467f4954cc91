"""From dirty marks to `compliance_hourly`: each marked hour is recomputed whole, in one transaction.

So a summary always equals a full recompute, however late the footage came, and its cost grows with the number of
marked hours. One aggregator at a time holds the lock: two that deleted marks side by side would lose an update.

Marks are written by `workers/jobs/recording.py`, `common/ledger/withdrawal.py` and `placements.py`; the producer asks
for a summary while there are some (`request_summary` in `producer/dispatch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import psycopg
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from common.database.sessions import session_scope, sql
from common.database.versions import AGGREGATION_LOCK, OLDEST_VERSION, Part, refuse_older
from common.ledger.retention import frozen_before
from common.observability import metrics
from common.timestamps import END, FIRST

#: Marks taken per transaction.
BATCH = 5000

_RECOMPUTE = """
WITH hours AS (
    SELECT h.location_id, h.pipeline_id, h.hour, l.time_zone
    FROM unnest(CAST(:locations AS integer[]), CAST(:pipelines AS integer[]), CAST(:hours AS timestamptz[]))
         AS h (location_id, pipeline_id, hour)
    JOIN locations l ON l.id = h.location_id
), looked AS (
    SELECT h.location_id, h.pipeline_id, h.hour, sum(c.frames) AS frames, sum(c.seconds) AS seconds
    FROM hours h
    JOIN frame_counts c USING (location_id, pipeline_id, hour)
    GROUP BY h.location_id, h.pipeline_id, h.hour
), found AS (
    -- The ranges let the index and the partitions be used: that of each hour, and that of all of them, without which
    -- Postgres plans for every partition there is. An hour is longer than 60 minutes where a zone turns its clocks by
    -- half an hour.
    SELECT h.location_id, h.pipeline_id, h.hour, count(*) AS faces,
           count(*) FILTER (WHERE f.status = 'with_mask') AS with_mask,
           count(*) FILTER (WHERE f.status = 'without_mask') AS without_mask,
           count(*) FILTER (WHERE f.status = 'uncertain') AS uncertain
    FROM hours h
    JOIN faces f ON f.location_id = h.location_id AND f.pipeline_id = h.pipeline_id
        AND f.observed_at >= h.hour AND f.observed_at < h.hour + interval '2 hours'
        AND f.observed_at >= :first AND f.observed_at < CAST(:last AS timestamptz) + interval '2 hours'
        AND date_trunc('hour', f.observed_at, h.time_zone) = h.hour
    GROUP BY h.location_id, h.pipeline_id, h.hour
), emptied AS (
    DELETE FROM compliance_hourly s USING hours h
    WHERE s.location_id = h.location_id AND s.pipeline_id = h.pipeline_id AND s.hour = h.hour
      AND NOT EXISTS (SELECT FROM looked k WHERE (k.location_id, k.pipeline_id, k.hour)
                                               = (h.location_id, h.pipeline_id, h.hour))
)
INSERT INTO compliance_hourly
    (location_id, pipeline_id, hour, frames, seconds, faces, with_mask, without_mask, uncertain)
SELECT k.location_id, k.pipeline_id, k.hour, k.frames, k.seconds, coalesce(f.faces, 0), coalesce(f.with_mask, 0),
       coalesce(f.without_mask, 0), coalesce(f.uncertain, 0)
FROM looked k LEFT JOIN found f USING (location_id, pipeline_id, hour)
ON CONFLICT (location_id, pipeline_id, hour) DO UPDATE SET
    frames = excluded.frames, seconds = excluded.seconds, faces = excluded.faces, with_mask = excluded.with_mask,
    without_mask = excluded.without_mask, uncertain = excluded.uncertain, summarized_at = clock_timestamp()
"""


DAY = timedelta(days=1)

#: Takes marks, and reads the oldest version of an aggregator that may. After taking the lock: a migration holds it from
#: before it writes the oldest versions until it commits, so what is read here holds until this transaction has ended.
#: NULL for an hour that no camera can have seen: an earlier version marked such hours, also years that no calendar of
#: Python reaches. They are in no summary.
_TAKE = f"""
DELETE FROM dirty_marks
WHERE id IN (SELECT id FROM dirty_marks ORDER BY id LIMIT :limit)
RETURNING location_id, pipeline_id, CASE WHEN hour >= :first AND hour < :end THEN hour END AS hour,
    ({OLDEST_VERSION}) AS oldest_version
"""  # noqa: S608 - constants


def summarize() -> int:
    """Work off all dirty marks; returns how many hours were recomputed."""
    hours, limit = 0, BATCH
    while True:
        try:
            with session_scope() as session:
                taken, recomputed = summarize_batch(session, limit)
        except OperationalError as error:
            # The batch took longer than the statement timeout: try smaller batches, down to one mark, before giving up.
            if not isinstance(error.orig, psycopg.errors.QueryCanceled) or limit == 1:
                raise
            limit = max(1, limit // 4)
            continue
        hours += recomputed
        metrics.count(metrics.SUMMARIZED, recomputed)
        if taken < limit:
            return hours


def summarize_batch(session: Session, limit: int) -> tuple[int, int]:
    """Take at most `limit` marks and recompute their hours; returns how many marks and how many hours.

    Raises `OutdatedProgramError`, with nothing taken, if an aggregator of this version may not go on.
    """
    # A statement of its own: under READ COMMITTED the next one sees all that was committed before we got the lock.
    session.execute(sql("SELECT pg_advisory_xact_lock(:key)"), {"key": AGGREGATION_LOCK})
    # A day on either side, for the hours of all zones.
    bounds = {"first": FIRST - DAY, "end": END + DAY}
    marks = session.execute(sql(_TAKE), {"limit": limit, "part": Part.AGGREGATOR.value, **bounds}).all()
    if marks:
        refuse_older(marks[0].oldest_version, Part.AGGREGATOR)
    frozen = frozen_before(session)
    hours = sorted(
        # The faces of purged hours are gone: a recompute would set their sums to 0.
        {
            (mark.location_id, mark.pipeline_id, mark.hour)
            for mark in marks
            if mark.hour is not None and (frozen is None or mark.hour >= frozen)
        }
    )
    if hours:
        recompute(session, hours)
    return len(marks), len(hours)


def recompute(session: Session, hours: Sequence[tuple[int, int, datetime]]) -> None:
    """Summarize these hours, (location id, pipeline id, hour) each, as they are now. The caller holds the lock."""
    locations, pipelines, starts = ([hour[column] for hour in hours] for column in range(3))
    session.execute(
        sql(_RECOMPUTE),
        {
            "locations": locations,
            "pipelines": pipelines,
            "hours": starts,
            "first": min(starts),
            "last": max(starts),
        },
    )
