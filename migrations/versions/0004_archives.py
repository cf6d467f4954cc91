"""Archives: backfills that are listed in parts, paused and cancelled, and objects in cold storage."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

#: The bucket of a source, as common/storage/store.py reads one.
BUCKET = "CASE WHEN source LIKE 's3://%' THEN 's3://' || split_part(substr(source, 6), '/', 1) ELSE 'file://' END"


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.execute(f"INSERT INTO sources (bucket) SELECT DISTINCT {BUCKET} FROM backfills ON CONFLICT DO NOTHING")
    op.add_column("backfills", sa.Column("source_id", sa.Integer(), nullable=True))
    op.execute(f"UPDATE backfills SET source_id = sources.id FROM sources WHERE sources.bucket = {BUCKET}")
    op.alter_column("backfills", "source_id", nullable=False)
    op.create_foreign_key(op.f("fk_backfills_source_id_sources"), "backfills", "sources", ["source_id"], ["id"])
    op.add_column("backfills", sa.Column("inventory", sa.Text()))
    op.add_column("backfills", sa.Column("paused_at", moment))
    op.add_column("backfills", sa.Column("cancelled_at", moment))
    # Only unfinished listings can be taken up, and theirs would have to begin again: nobody could.
    op.drop_column("backfills", "cursor")

    op.create_table(
        "backfill_parts",
        sa.Column("backfill_id", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("begins_after", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("ends_with", sa.Text()),
        sa.Column("manifest_file", sa.Text()),
        sa.Column("cursor", sa.Text()),
        sa.Column("counts", sa.dialects.postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("finished_at", moment),
        sa.ForeignKeyConstraint(
            ["backfill_id"], ["backfills.id"], name=op.f("fk_backfill_parts_backfill_id_backfills")
        ),
        sa.PrimaryKeyConstraint("backfill_id", "number", name=op.f("pk_backfill_parts")),
    )

    op.add_column("media_objects", sa.Column("storage_class", sa.Text()))
    op.add_column("media_objects", sa.Column("restore_requested_at", moment))

    # By backfill, too, so that a paused one is passed over, however many of its jobs wait.
    for name, half in (("ix_jobs_pending", "NOT alone"), ("ix_jobs_pending_alone", "alone")):
        op.drop_index(name, table_name="jobs")
        op.create_index(
            name,
            "jobs",
            ["source_id", sa.text("coalesce(backfill_id, 0)"), "lane", "id"],
            postgresql_where=sa.text(f"state = 'pending' AND {half}"),
        )
    # Of a backfill: how many jobs stand where, without a look at the rows.
    op.drop_index("ix_jobs_backfill_id", table_name="jobs")
    op.create_index("ix_jobs_backfill_id", "jobs", ["backfill_id", "state"])
