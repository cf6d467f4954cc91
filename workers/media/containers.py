"""Opens a video file: the only module that decides what FFmpeg may do with untrusted bytes.

The content decides what a file is, never its name. Only the containers and codecs listed here are tried, and the
demuxer is named, so that FFmpeg guesses nothing: a playlist named like a video is refused. A demuxer can't open any
other file or address.
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
#: Valid containers, for messages.
CONTAINERS = "MP4, MOV, Matroska, WebM, AVI, MPEG-TS or GIF"

#: Errors that are the machine's and not the file's fault: no memory, too many open files.
_MACHINE_FAULTS = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE})
#: How many packets are tried at most to get the first frame.
_FIRST_PACKETS = 1000


class NoMemoryError(TransientJobError):
    """FFmpeg did not get the memory it asked for: this machine is short of it, or the file claims too much."""


class VideoFile:
    """An opened video. Times are seconds from the start of its video stream, exact."""

    def __init__(self, reader: Reader, *, max_pixels: int, threads: int) -> None:
        """Raises `PermanentJobError` for a file that isn't a video, has no video stream, or can't or may not be
        decoded; errors of `reader` are passed on."""
        self._reader = reader
        self._max_pixels = max_pixels
        self._threads = threads
        self.format = self._recognise()
        self._open()

    def close(self) -> None:
        self._container.close()

    def restart(self) -> None:
        """Go back to the first packet, even if the container can't seek."""
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
                # FFmpeg decodes the first frames to complete the header: these limits hold there, too. (For an
                # MPEG-TS it ignores the first one.)
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
        # For sizes that are missing in the header, or that change in the middle.
        codec.options = {**codec.options, "max_pixels": str(self._max_pixels)}
        codec.thread_count = self._threads
        codec.thread_type = "AUTO"

    # --- times ---

    @property
    def start_pts(self) -> int:
        return int(self.stream.start_time or 0)

    def shown(self, part: Any) -> Fraction | None:
        """When a packet or frame is shown; None if it has no time. Times before the start are set to the start.

        For an AVI it is when a packet is decoded (see `tells_when_shown`).
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
        """Whether time stamps tell when a frame is shown. In an AVI they tell when it is decoded, which differs with
        B-frames."""
        return self.format != "avi"

    @property
    def enterable(self) -> bool:
        """Whether decoding can begin at any keyframe. Not in a GIF, whose frames build on all earlier ones, nor in an
        AVI with B-frames, where only counting from the first frame tells when a frame is shown."""
        return self.format != "gif" and (self.tells_when_shown or not self.stream.codec_context.has_b_frames)

    @property
    def end(self) -> Fraction | None:
        """Where the video stream ends, by its own header; None if only the whole file has a length."""
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
        """Corrects Matroska's length, which counts from 0, and not from where the video begins."""
        if self.format == "matroska":
            length -= self.start_pts * Fraction(self.stream.time_base)
        return length if length > 0 else None

    # --- the header ---

    def info(self) -> VideoInfo:
        """The facts of the header; the first frame is decoded for the rotation and for a missing size.

        Raises `PermanentJobError` with empty_video if there is no frame at all, and with broken_timestamps if the clock
        of an MPEG-TS is set back: seeking by time would find the wrong part, unnoticed.
        """
        if self.format == "mpegts" and is_set_back(self._reader):
            raise PermanentJobError(
                Reason.BROKEN_TIMESTAMPS,
                "its clock is set back in the middle, as in recordings that were joined byte by byte, so the time of a "
                "frame is unknown; upload the parts, or write the video anew with continuous time stamps",
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
        """The first frame; None if the first packets are damaged; later ones may still be intact."""
        packets, self._untouched = 0, False
        try:
            # The last, empty packet makes the decoder give the frames that it still holds.
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
        """The frames that the decoder gives after this packet; None: those that it still holds. Raises FFmpeg's errors,
        and `PermanentJobError` for a packet that was made to keep the decoder busy."""
        codec = self.stream.codec_context
        if codec.name == "mjpeg" and packet is not None and has_too_many_scans(bytes(packet)):
            raise PermanentJobError(
                Reason.FRAME_TOO_LARGE,
                f"one of its frames takes more than {MAX_JPEG_SCANS} passes over all of its pixels; write it anew",
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
        """Raise the cause of an FFmpeg error or of an early end of the file, if the file is not at fault: the error of
        reading the object, or `TransientJobError` if this machine lacks memory or file handles."""
        if self._reader.error is not None:
            raise self._reader.error
        if error is not None and error.errno in _MACHINE_FAULTS:
            kind = NoMemoryError if error.errno == errno.ENOMEM else TransientJobError
            raise kind(Reason.UNEXPECTED_ERROR, f"this machine lacks memory or file handles: {first_line(error)}")

    # --- recognition ---

    def _recognise(self) -> str:
        self._head = read_at(self._reader, 0, 4096)
        if not self._head:
            raise PermanentJobError(Reason.EMPTY_FILE, "the file is empty; upload it again")
        found = recognise(self._head)
        if found is None:
            raise PermanentJobError(Reason.UNREADABLE_VIDEO, f"the content is not an {CONTAINERS} video; convert it")
        return found

    def _cannot_open(self, error: FFmpegError) -> PermanentJobError:
        self._check_index()
        words = first_line(error)
        return PermanentJobError(
            Reason.UNREADABLE_VIDEO, f"the {self.format} file is damaged and can't be opened ({words}); upload it again"
        )

    def _check_index(self) -> None:
        """Raise `PermanentJobError` if an MP4's index is missing, which explains that no stream or frame was found."""
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
