"""Opens a video file: the one place that decides what FFmpeg may do with a stranger's bytes.

The content decides what a file is, never its name. Only the containers and codecs listed here are tried, with the
demuxer named, so that nothing is guessed: a playlist in a video's clothes is no video. Every way in which a demuxer
could open another file or address is closed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any, NoReturn

import av
from av.error import FFmpegError
from av.stream import Discard

from common.domain import PermanentJobError, Reason, TransientJobError, VideoInfo, first_line
from workers.media.sniffing import (
    MAX_JPEG_SCANS,
    Reader,
    has_index,
    has_too_many_scans,
    is_set_back,
    length_of_cut_avi,
    read_at,
    recognise,
)

#: Names of FFmpeg's decoders.
CODECS = frozenset(
    {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mjpeg", "mpeg4", "mpeg2video", "gif"}
)
#: What a person may be told to convert to.
CONTAINERS = "MP4, MOV, Matroska, WebM, AVI, MPEG-TS or GIF"

#: What says nothing of a file: no memory, no more open files.
_MACHINE_FAULTS = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE})
#: Packets that are tried until one gives the first frame.
_FIRST_PACKETS = 1000


class NoMemoryError(TransientJobError):
    """FFmpeg did not get the memory it asked for: this machine is short of it, or the file claims what none has."""


class VideoFile:
    """An opened video. Times are seconds from the start of its video stream, exact."""

    def __init__(self, reader: Reader, *, max_pixels: int, threads: int) -> None:
        """Raises `PermanentJobError` for what is no video, has no picture in it, or can't or may not be decoded;
        whatever `reader` raises comes through."""
        self._reader = reader
        self._max_pixels = max_pixels
        self._threads = threads
        self.format = self._recognise()
        self._open()

    def close(self) -> None:
        self._container.close()

    def restart(self) -> None:
        """Go back to the first packet, also where a container can't seek."""
        if not self._untouched:
            self._container.close()
            self._open()

    def _open(self) -> None:
        self._reader.seek(0)
        try:
            self._container: Any = av.open(
                self._reader,
                format=self.format,
                io_open=_deny,
                # FFmpeg decodes the first frames to complete the header: these limits hold there, too. (Of an
                # MPEG-TS it doesn't take the first.)
                options={"max_pixels": str(self._max_pixels)},
                container_options={"codec_whitelist": ",".join(sorted(CODECS)), "protocol_whitelist": "none"},
                metadata_errors="replace",
            )
        except FFmpegError as error:
            self.reraise(error)
            raise self._cannot_open(error) from error
        try:
            self._choose_stream()
        except BaseException:
            self._container.close()
            raise
        self._untouched = True

    def _choose_stream(self) -> None:
        streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            self._check_index()
            raise PermanentJobError(
                Reason.NO_VIDEO_STREAM, "the file holds no video, only sound or data; leave it out or upload the video"
            )
        self.stream: Any = streams[0]
        for other in self._container.streams:
            if other.index != self.stream.index:
                other.discard = Discard.all
        self._prepare_codec()

    def _prepare_codec(self) -> None:
        codec = self.stream.codec_context
        if codec is None or codec.name not in CODECS:
            name = codec.name if codec is not None else "unknown"
            raise PermanentJobError(
                Reason.UNSUPPORTED_CODEC,
                f"the codec {name!r} can't be decoded here; convert the video to H.264, HEVC, VP9, AV1 or MJPEG",
            )
        width, height = codec.width or 0, codec.height or 0
        if width * height > self._max_pixels:
            raise PermanentJobError(
                Reason.FRAME_TOO_LARGE,
                f"the video's frames have {width} × {height} pixels, the limit is {self._max_pixels} in all; scale it "
                "down or raise MASKWATCH_WORKER__MAX_FRAME_PIXELS",
            )
        # For sizes that the header doesn't tell, or that change in the middle.
        codec.options = {**codec.options, "max_pixels": str(self._max_pixels)}
        codec.thread_count = self._threads
        codec.thread_type = "AUTO"

    # --- times ---

    @property
    def start_pts(self) -> int:
        return int(self.stream.start_time or 0)

    def shown(self, part: Any) -> Fraction | None:
        """When a packet or frame is shown; None if it doesn't tell. What comes before the start is shown at it.

        Of an AVI it is when a packet is decoded (see `tells_when_shown`).
        """
        pts = part.pts if part.pts is not None and self.tells_when_shown else part.dts
        if pts is None:
            return None
        since_start: Fraction = (pts - self.start_pts) * Fraction(self.stream.time_base)
        return max(Fraction(0), since_start)

    def seconds_of(self, duration: int | None) -> Fraction:
        return (duration or 0) * Fraction(self.stream.time_base)

    @property
    def tells_when_shown(self) -> bool:
        """Whether time stamps tell when a frame is shown. AVI's tell when it is decoded, which B-frames make differ."""
        return self.format != "avi"

    @property
    def enterable(self) -> bool:
        """Whether decoding can begin at any keyframe. Not in a GIF, whose frames build on all before, nor in an AVI
        with B-frames, where only counting from the first one tells when a frame is shown."""
        return self.format != "gif" and (self.tells_when_shown or not self.stream.codec_context.has_b_frames)

    @property
    def end(self) -> Fraction | None:
        """Where the video stream ends by its own account; None where only the file as a whole says so."""
        if self.format == "avi" and (length := length_of_cut_avi(self._head, self._reader.size)):
            return length
        if self.stream.duration:
            return self.seconds_of(self.stream.duration)
        # Matroska keeps it as text: "00:00:10.000000000".
        written = re.fullmatch(
            r"(\d{1,6}):(\d\d):(\d\d(?:\.\d{1,9})?)", self.stream.metadata.get("DURATION", ""), re.ASCII
        )
        if written is not None:
            hours, minutes, seconds = (Fraction(part) for part in written.groups())
            return self._without_start(3600 * hours + 60 * minutes + seconds)
        return self._whole_length if len(self._container.streams) == 1 else None

    @property
    def _whole_length(self) -> Fraction | None:
        length = self._container.duration
        return self._without_start(Fraction(length, av.time_base)) if length and length > 0 else None

    def _without_start(self, length: Fraction) -> Fraction | None:
        """Matroska counts its length from 0, and not from where the video begins."""
        if self.format == "matroska":
            length -= self.start_pts * Fraction(self.stream.time_base)
        return length if length > 0 else None

    # --- the header ---

    def info(self) -> VideoInfo:
        """What the header says; for the rotation and a size that it leaves out, the first frame is decoded.

        Raises `PermanentJobError` with empty_video where there is no frame at all, and with broken_timestamps where
        the clock of an MPEG-TS is set back: who seeks in it by time would find the wrong part, and not notice.
        """
        if self.format == "mpegts" and is_set_back(self._reader):
            raise PermanentJobError(
                Reason.BROKEN_TIMESTAMPS,
                "its clock is set back in the middle, as in recordings that were joined byte by byte, so nobody can "
                "tell when a frame was taken; upload the parts, or write it anew with continuous time stamps",
            )
        length = self.end or self._whole_length
        rate = self.stream.average_rate or self.stream.guessed_rate
        codec = self.stream.codec_context
        width, height, rotation = codec.width, codec.height, 0
        first = self._first_frame()
        if first is not None:
            width, height, rotation = first.width, first.height, first.rotation % 360
        if not width or not height:
            raise PermanentJobError(
                Reason.UNREADABLE_VIDEO,
                "neither its header nor its first frame tells a size that can be decoded: it is damaged, or its frames "
                f"have more than the {self._max_pixels} pixels that MASKWATCH_WORKER__MAX_FRAME_PIXELS allows",
            )
        return VideoInfo(
            container=str(self._container.format.name),
            codec=str(codec.codec.canonical_name),
            width=int(width),
            height=int(height),
            frame_rate=float(rate) if rate else None,
            rotation=rotation,
            duration_seconds=float(length) if length else None,
            created_at=_created_at(self._container.metadata.get("creation_time")),
        )

    def _first_frame(self) -> Any | None:
        """The first frame; None where the first packets are damaged, which says nothing of the others."""
        packets, self._untouched = 0, False
        try:
            # The last, empty packet asks the decoder for what it still holds.
            for packet in self._container.demux(self.stream):
                packets += packet.size > 0
                for frame in self.decode(packet):
                    return frame
                if packets == _FIRST_PACKETS:
                    return None
        except FFmpegError as error:
            self.reraise(error)
            if packets:
                return None
        self._check_index()
        raise PermanentJobError(Reason.EMPTY_VIDEO, "the video has no frames; upload it again, whole")

    # --- packets ---

    def packets(self) -> Iterator[Any]:
        """The packets of the video stream from here on, without the empty one that PyAV ends with."""
        self._untouched = False
        for packet in self._container.demux(self.stream):
            if packet.size:
                yield packet

    def decode(self, packet: Any | None) -> list[Any]:
        """The frames that the decoder has after this packet; None: those that it still holds. Raises FFmpeg's errors,
        and `PermanentJobError` for a packet that is made to keep the decoder busy."""
        codec = self.stream.codec_context
        if codec.name == "mjpeg" and packet is not None and has_too_many_scans(bytes(packet)):
            raise PermanentJobError(
                Reason.FRAME_TOO_LARGE,
                f"one of its frames is told in more than {MAX_JPEG_SCANS} passes over all of its pixels; write it anew",
            )
        return list(codec.decode(packet))

    def seek(self, at: Fraction) -> bool:
        """Go to a keyframe that begins, by the container's index, at or before `at`; False where that fails."""
        self._untouched = False
        target = self.start_pts + int(at / Fraction(self.stream.time_base))
        try:
            self._container.seek(target, stream=self.stream, backward=True)
        except FFmpegError as error:
            self.reraise(error)
            return False
        return True

    def reraise(self, error: FFmpegError | None = None) -> None:
        """Raise what is behind an error of FFmpeg's, or behind an end of the file, if that is not the file's fault:
        what reading the object raised, or `TransientJobError` where this machine is out of something."""
        if self._reader.error is not None:
            raise self._reader.error
        if error is not None and error.errno in _MACHINE_FAULTS:
            kind = NoMemoryError if error.errno == errno.ENOMEM else TransientJobError
            raise kind(Reason.UNEXPECTED_ERROR, f"this machine is short of something: {first_line(error)}")

    # --- recognition ---

    def _recognise(self) -> str:
        self._head = read_at(self._reader, 0, 4096)
        if not self._head:
            raise PermanentJobError(Reason.EMPTY_FILE, "the file is empty; upload it again")
        found = recognise(self._head)
        if found is None:
            raise PermanentJobError(Reason.UNREADABLE_VIDEO, f"the content is no {CONTAINERS} video; convert it")
        return found

    def _cannot_open(self, error: FFmpegError) -> PermanentJobError:
        self._check_index()
        words = first_line(error)
        return PermanentJobError(
            Reason.UNREADABLE_VIDEO, f"the {self.format} file is damaged and can't be opened ({words}); upload it again"
        )

    def _check_index(self) -> None:
        """Nothing was found: say so if it is for want of an MP4's index."""
        if self.format == "mp4" and not has_index(self._reader):
            raise PermanentJobError(
                Reason.UNREADABLE_VIDEO,
                "its index (the moov box) is missing, as in a recording that was cut off; upload it again, whole",
            )


def _deny(url: str, _flags: int, _options: dict[str, str]) -> NoReturn:
    raise PermanentJobError(
        Reason.UNREADABLE_VIDEO, f"it refers to another file ({url[:200]!r}), which is never opened; upload it whole"
    )


def _created_at(text: str | None) -> datetime | None:
    try:
        created = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return created if created.tzinfo is not None else created.replace(tzinfo=UTC)
