"""Sources that pause themselves, a record of what operators did, purged time, erased objects, and a function that
makes a partition of `faces` for those who may not."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

# With the owner's rights, so that the producer needs none to change tables: it may have a month made, and nothing
# else. Its name is put together from digits. The caller sets lock_timeout.
MAKE_PARTITION = """
CREATE FUNCTION make_faces_partition(month timestamptz) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    first timestamptz := date_trunc('month', month);
    following timestamptz := first + interval '1 month';
    name text := to_char(first, '"faces_"YYYY_MM');
BEGIN
    IF first < '1970-01-01' OR first > '2199-12-01' THEN
        RAISE EXCEPTION 'no partition is made for %', month USING ERRCODE = 'datetime_field_overflow';
    END IF;
    PERFORM pg_advisory_xact_lock({lock});
    -- Read as rows, because to_regclass() may answer from what this connection remembers from before the lock.
    PERFORM FROM pg_class WHERE relname = name AND relnamespace = '{schema}'::regnamespace;
    IF FOUND THEN
        RETURN false;
    END IF;
    -- Filled first and attached then, because ATTACH refuses while the default holds rows of this month.
    LOCK TABLE faces_default IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('CREATE TABLE %I (LIKE faces INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
    EXECUTE format('WITH moved AS (DELETE FROM faces_default WHERE observed_at >= %L AND observed_at < %L RETURNING *)'
                   ' INSERT INTO %I SELECT * FROM moved', first, following, name);
    EXECUTE format('ALTER TABLE faces ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, first, following);
    RETURN true;
END
$$
"""

#: As common/database/partitions.py had it before this migration: "maskwatch partitions".
PARTITION_LOCK = 0x6D77_7061


def upgrade() -> None:
    clock = sa.text("clock_timestamp()")
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "sources",
        sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("refusals", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("refusing_since", moment),
        sa.Column("paused_at", moment),
        sa.Column("next_trial_at", moment),
        sa.Column("trials", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("detail", sa.Text()),
        sa.Column("created_at", moment, server_default=clock, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sources")),
        sa.UniqueConstraint("bucket", name=op.f("uq_sources_bucket")),
    )
    op.execute("INSERT INTO sources (bucket) SELECT DISTINCT bucket FROM media_objects")
    op.add_column("jobs", sa.Column("source_id", sa.Integer(), nullable=True))
    op.execute(
        "UPDATE jobs SET source_id = sources.id FROM media_objects JOIN sources USING (bucket)"
        " WHERE media_objects.id = jobs.media_object_id"
    )
    op.alter_column("jobs", "source_id", nullable=False)
    op.create_foreign_key(op.f("fk_jobs_source_id_sources"), "jobs", "sources", ["source_id"], ["id"])
    for name, half in (("ix_jobs_pending", "NOT alone"), ("ix_jobs_pending_alone", "alone")):
        op.drop_index(name, table_name="jobs")
        op.create_index(
            name, "jobs", ["source_id", "lane", "id"], postgresql_where=sa.text(f"state = 'pending' AND {half}")
        )
    op.create_index(
        "ix_jobs_quarantined_source",
        "jobs",
        ["source_id", "finished_at"],
        postgresql_where=sa.text("state = 'quarantined'"),
    )

    op.create_table(
        "operator_actions",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("database_user", sa.Text(), server_default=sa.text("SESSION_USER"), nullable=False),
        sa.Column("detail", sa.Text()),
        sa.Column("at", moment, server_default=clock, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operator_actions")),
    )
    op.create_table(
        "operator_action_jobs",
        sa.Column("action_id", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["action_id"], ["operator_actions.id"], name=op.f("fk_operator_action_jobs_action_id_operator_actions")
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_operator_action_jobs_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "action_id", name=op.f("pk_operator_action_jobs")),
    )

    op.create_table(
        "purges",
        sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("before", moment, nullable=False),
        sa.Column("action_id", sa.BigInteger(), nullable=False),
        sa.Column("frozen_at", moment),
        sa.Column("finished_at", moment),
        sa.ForeignKeyConstraint(
            ["action_id"], ["operator_actions.id"], name=op.f("fk_purges_action_id_operator_actions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_purges")),
    )
    op.create_table(
        "erased_objects",
        sa.Column("uri_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("action_id", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["action_id"], ["operator_actions.id"], name=op.f("fk_erased_objects_action_id_operator_actions")
        ),
        sa.PrimaryKeyConstraint("uri_sha256", name=op.f("pk_erased_objects")),
    )

    schema = op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))
    op.execute(MAKE_PARTITION.format(schema=schema, lock=PARTITION_LOCK))
    op.execute("REVOKE EXECUTE ON FUNCTION make_faces_partition(timestamptz) FROM PUBLIC")
