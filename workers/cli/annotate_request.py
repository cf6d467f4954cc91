"""The request of `maskwatch annotate`: options that fit each other and the output."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from common.domain import MaskwatchError
from common.planning import IMAGE_SUFFIXES, VIDEO_SUFFIXES


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command, checked: they fit each other and `out`."""

    source: str | None
    out: Path
    at: Fraction | None = None
    face_id: int | None = None
    blur: bool = False
    sample_fps: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raises `MaskwatchError` for options that exclude each other."""
        if self.face_id is not None and self.source is not None:
            raise MaskwatchError(
                "--face looks up the footage by itself: leave out SOURCE, or leave out --face to analyse SOURCE"
            )
        if self.face_id is None and self.source is None:
            raise MaskwatchError("name a SOURCE: a picture, a video, a folder or an s3:// prefix; or --face ID")
        if self.at is not None and self.face_id is not None:
            raise MaskwatchError("--face finds the time by itself: leave out --at")
        if self.one_image and self.suffix != ".png":
            raise MaskwatchError(f"--at and --face write one picture: name it, --out NAME.png instead of {self.out}")
        if self.suffix == ".png" and not self.one_image:
            raise MaskwatchError(
                f"--out {self.out} takes one frame of a video (--at 00:01:30) or a stored face (--face ID); for "
                "pictures, name a folder"
            )
        if self.suffix not in ("", ".png", ".mp4"):
            raise MaskwatchError(
                f"--out {self.out} can't be written; name a folder for pictures, NAME.mp4 for a video, or NAME.png "
                "for one frame of it"
            )
        if self.sample_fps is not None and self.suffix != ".mp4":
            raise MaskwatchError("--sample-fps is for a video that is written as a video, with --out NAME.mp4")
        if self.sample_fps is not None and self.blur:
            raise MaskwatchError(
                "with --blur every frame is analysed, because faces would slip through between: leave out --sample-fps"
            )
        if self.limit is not None and self.suffix:
            raise MaskwatchError("--limit counts pictures, which go to a folder: leave it out")

    @property
    def one_image(self) -> bool:
        return self.at is not None or self.face_id is not None

    @property
    def suffix(self) -> str:
        """The suffix of `out`, if it is one of a picture or a video; "" for a folder, whatever its name."""
        suffix = self.out.suffix.lower()
        known = suffix.removeprefix(".") in IMAGE_SUFFIXES | VIDEO_SUFFIXES
        return suffix if known and not self.out.is_dir() else ""
