"""${message}"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.compatibility import set_oldest
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    # First: the oldest version of each part that may work on the schema from here on (docs/versions.md).
    set_oldest(producer=..., worker=..., aggregator=..., command=...)
    ${upgrades if upgrades else "pass"}
