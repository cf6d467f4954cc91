"""The fixture `archive`: rows for the read side."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from tests.archive import Archive


@pytest.fixture
def archive(session: Session) -> Archive:
    return Archive(session)
