"""Least authority in Postgres: a role per part of a deployment, with the rights that it uses and no more.

The migrator owns the schema; its login migrates, grants, purges and erases, and does nothing else. The other roles
have no login: the logins of a deployment are made members of them. `maskwatch db grant` gives the rights, and must be
run again after every migration; docs/operations.md says how the logins are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from common.domain import MaskwatchError

#: Rights by table; those of a column as `SELECT (column)`. Locking rows needs the right to update them.
RIGHTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    # Discovers, plans, dispatches and recovers; also runs the operators' commands.
    "maskwatch_producer": {
        "oldest_versions": ("SELECT",),
        "locations": ("SELECT", "INSERT", "UPDATE (promoted_pipeline_id)"),
        "cameras": ("SELECT", "INSERT", "UPDATE"),
        "camera_slots": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        "pipelines": ("SELECT", "INSERT"),
        "sources": ("SELECT", "INSERT", "UPDATE"),
        "backfills": ("SELECT", "INSERT", "UPDATE"),
        "backfill_parts": ("SELECT", "INSERT", "UPDATE"),
        "media_objects": ("SELECT", "INSERT", "UPDATE"),
        "jobs": ("SELECT", "INSERT", "UPDATE"),
        "job_attempts": ("SELECT", "INSERT"),
        # Registering a newer version of a key deletes the rows of the older version.
        "frame_counts": ("SELECT", "DELETE"),
        "faces": ("SELECT (job_id)", "DELETE"),
        "faces_default": ("SELECT (observed_at)",),
        "dirty_marks": ("SELECT", "INSERT"),
        "compliance_hourly": ("SELECT",),
        "operator_actions": ("SELECT", "INSERT"),
        "operator_action_jobs": ("SELECT", "INSERT"),
        "purges": ("SELECT",),
        "erased_objects": ("SELECT",),
        "failing_steps": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    },
    # Does jobs, and registers the new version of an object that was replaced.
    "maskwatch_worker": {
        "oldest_versions": ("SELECT",),
        "locations": ("SELECT",),
        "cameras": ("SELECT",),
        "pipelines": ("SELECT",),
        "sources": ("SELECT", "UPDATE"),
        "media_objects": ("SELECT", "INSERT", "UPDATE"),
        "jobs": ("SELECT", "INSERT", "UPDATE"),
        "job_attempts": ("INSERT",),
        "frame_counts": ("SELECT", "INSERT", "DELETE"),
        "faces": ("SELECT (job_id)", "INSERT", "DELETE"),
        "dirty_marks": ("INSERT",),
        "purges": ("SELECT",),
        "erased_objects": ("SELECT",),
    },
    "maskwatch_aggregator": {
        "oldest_versions": ("SELECT",),
        "locations": ("SELECT",),
        "frame_counts": ("SELECT",),
        "faces": ("SELECT (location_id, pipeline_id, observed_at, status)",),
        "dirty_marks": ("SELECT", "DELETE"),
        "compliance_hourly": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        "purges": ("SELECT",),
    },
    # Reads what docs/schema.md describes, but not the tokens: with a token, a message could be forged.
    "maskwatch_analyst": {
        **dict.fromkeys(
            (
                "face_results",
                "visit_results",
                "compliance_by_hour",
                "compliance_by_day",
                "coverage_hourly",
                "locations",
                "cameras",
                "camera_slots",
                "pipelines",
                "sources",
                "backfills",
                "backfill_parts",
                "media_objects",
                "job_attempts",
                "frame_counts",
                "faces",
                "dirty_marks",
                "compliance_hourly",
                "operator_actions",
                "operator_action_jobs",
                "purges",
                "oldest_versions",
                "failing_steps",
            ),
            ("SELECT",),
        ),
        "jobs": (
            "SELECT (id, media_object_id, source_id, pipeline_id, backfill_id, kind, range_start_ms, range_end_ms,"
            " lane, state, attempt, failures, crashes, lost_leases, alone, next_run_at, queued_at, sent_lane,"
            " started_at, lease_until, worker, finished_at, reason, detail, created_at)",
        ),
    },
}

#: Other objects, by role.
MORE_RIGHTS: Mapping[str, Sequence[str]] = {
    "maskwatch_producer": ("EXECUTE ON FUNCTION make_faces_partition(timestamptz)",),
    "maskwatch_worker": ("USAGE ON SEQUENCE faces_id_seq",),
}


def statements(schema: str) -> list[str]:
    """The SQL that gives every role its rights and revokes all others. `schema` is quoted."""
    written: list[str] = []
    for role, rights in RIGHTS.items():
        written += [
            f"REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {role}",
            f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA {schema} FROM {role}",
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"GRANT SELECT ON alembic_version TO {role}",
        ]
        written += [f"GRANT {', '.join(given)} ON {table} TO {role}" for table, given in rights.items()]
        written += [f"GRANT {given} TO {role}" for given in MORE_RIGHTS.get(role, ())]
    return written


def missing(session: Session) -> list[str]:
    """The roles of `RIGHTS` that this server does not have."""
    found = session.scalars(text("SELECT rolname FROM pg_roles WHERE rolname = ANY(:names)"), {"names": list(RIGHTS)})
    return sorted(set(RIGHTS) - set(found))


def grant(session: Session) -> list[str]:
    """Make the missing roles, and give all roles their rights; returns the names of the new ones.

    Raises `MaskwatchError`, with what an administrator has to do, if this login may not do that.
    """
    to_make = missing(session)
    try:
        for role in to_make:
            session.execute(text(f"CREATE ROLE {role} NOLOGIN"))
        schema = session.scalar(text("SELECT quote_ident(current_schema())"))
        for statement in statements(schema):
            session.execute(text(statement))
    except ProgrammingError as error:
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise
        if to_make:
            commands = " ".join(f"CREATE ROLE {role} NOLOGIN;" for role in to_make)
            raise MaskwatchError(f"this login may not make roles; have an administrator run: {commands}") from error
        raise MaskwatchError(
            "only the owner of the tables, who ran `maskwatch db upgrade`, can grant rights on them"
        ) from error
    return to_make
