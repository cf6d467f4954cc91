"""The labelled sets that the tests here share."""

from tests.labelled_sets import write_faces, write_scene

__all__ = ["write_faces", "write_scene"]
