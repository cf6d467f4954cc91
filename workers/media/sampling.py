"""Samples the frames of a video that are analysed, without decoding more packets than they need.

The rule. A grid of R cells per second lies over the file's own time: cell k is [k/R, (k+1)/R) seconds. From each cell
the first frame that is shown in it is taken, or, for keyframes, the first keyframe in it. A cell belongs to the chunk
that contains its start. So the sampled frames do not depend on how a file is cut into chunks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from av.error import FFmpegError

from common.domain import PermanentJobError, PipelineSpec, Reason, SampleMode, first_line
from workers.media.containers import VideoFile

#: Seconds before the wanted time from which a keyframe is searched, one after the other: an index may use decoding
#: times, and seeking in a container without an index may end between two keyframes.
_MARGINS = (0, 1, 4, 16, 64, 256)
#: Decoding times that step back by more than this are broken; smaller steps are rounding.
_BACKWARD_SECONDS = 1
#: A video that ends this much earlier than its header says is cut off.
_SHORT_SECONDS = 1
#: Limit of the packets that wait for the decision whether they must be decoded, in bytes.
_HELD_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of 1/fps seconds over the file's own time, beginning at 0."""

    fps: Fraction

    @classmethod
    def of(cls, spec: PipelineSpec) -> Grid:
        # By way of its decimal digits: 29.97 means 2997/100.
        return cls(Fraction(str(spec.sample_fps)))

    def cell(self, at: Fraction) -> int:
        """The cell that a time lies in."""
        return math.floor(at * self.fps)

    def start(self, cell: int) -> Fraction:
        """When a cell begins, in seconds."""
        return cell / self.fps

    def first_from(self, at_ms: int) -> int:
        """The first cell that begins at or after a time: [first_from(a), first_from(b)) are those of a chunk [a, b)."""
        return math.ceil(Fraction(at_ms, 1000) * self.fps)


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled frame. frame: PyAV's; at: when it is shown, in seconds; cell: the number of its cell."""

    frame: Any
    at: Fraction
    cell: int


class Sampler:
    """Takes the frames of the cells [first, stop) of a video; stop None: to the end of the file.

    After the iteration `cut_off_at` says where the video ended too early, in seconds, or is None; frames decoded until
    then have been given. `undecodable` counts the cells with frames in the file of which none could be decoded.
    """

    def __init__(
        self,
        video: VideoFile,
        grid: Grid,
        mode: SampleMode,
        first: int,
        stop: int | None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """tick: called for each packet, to report progress even if no frame is wanted for long; an error that it raises
        ends the iteration."""
        self.cut_off_at: Fraction | None = None
        self._tick = tick
        self._video = video
        self._grid = grid
        self._mode = mode
        self._stop = stop
        #: The first cell that has no frame yet.
        self._wanted = first
        #: Up to where packets were seen, needed or not.
        self._reached = Fraction(0)
        self._damage: str | None = None
        self._taken = 0
        #: Cells that packets are shown in, and no frame was taken for yet.
        self._expected: set[int] = set()
        #: Times of packets whose frames have not come yet, a heap, where only packets have times.
        self._fed: list[Fraction] = []

    def __iter__(self) -> Iterator[Sample]:
        if self._is_done():
            return
        broken_off = False
        try:
            yield from self._keyframes() if self._mode is SampleMode.KEYFRAMES else self._frames()
        except FFmpegError as error:
            # The demuxer gives up: earlier frames count, and those that the decoder still holds.
            self._video.reraise(error)
            broken_off = True
            if self._mode is SampleMode.FRAMES:
                yield from self._take(self._decode(None))
        self._video.reraise()
        if not self._is_done():
            self.cut_off_at = self._reached if broken_off else self._missing_from()
        if self.undecodable and not self._taken:
            raise PermanentJobError(
                Reason.UNREADABLE_VIDEO,
                f"no frame of it can be decoded ({self._damage or 'the decoder gives none'}); upload it again",
            )

    @property
    def undecodable(self) -> int:
        return len(self._expected)

    def _is_done(self) -> bool:
        return self._stop is not None and self._wanted >= self._stop

    def _missing_from(self) -> Fraction | None:
        """The file has ended: from where on something is missing, by its header; None if nothing is."""
        end = self._video.end
        if end is None:
            return None
        expected = end if self._stop is None else min(end, self._grid.start(self._stop))
        return self._reached if self._reached < expected - _SHORT_SECONDS else None

    def _see(self, packet: Any) -> Fraction | None:
        """When a packet is shown; also records how far the video was read."""
        self._tick()
        shown = self._video.shown(packet)
        if shown is not None:
            self._reached = max(self._reached, shown + self._video.seconds_of(packet.duration))
            cell = self._grid.cell(shown)
            wanted = self._mode is SampleMode.FRAMES or packet.is_keyframe
            if wanted and cell >= self._wanted and (self._stop is None or cell < self._stop):
                self._expected.add(cell)
        return shown

    # --- every frame ---

    def _frames(self) -> Iterator[Sample]:
        gate = _Gate()
        if self._video.enterable:
            gate.close()
        for packet in self._packets():
            shown = self._see(packet)
            if self._is_behind(packet):
                break
            ready = gate.admit(packet, shown, self._grid.start(self._wanted))
            if ready.fresh:
                self._video.stream.codec_context.flush_buffers()
                self._fed.clear()
            for each in ready.packets:
                taken = yield from self._take(self._decode(each))
                if self._is_done():
                    return
                if taken and self._video.enterable:
                    gate.close()
        yield from self._take(self._decode(None))

    def _is_behind(self, packet: Any) -> bool:
        """Whether all packets of the chunk have been read: packets come in decoding order, and a packet is decoded
        before it is shown."""
        if self._stop is None or packet.dts is None or not self._video.tells_when_shown:
            return False
        return self._video.seconds_of(packet.dts - self._video.start_pts) >= self._grid.start(self._stop)

    def _take(self, frames: list[Any]) -> Generator[Sample, None, bool]:
        """Yields the decoded frames that are the first of their cells; returns whether there was one."""
        taken = False
        for frame in frames:
            at = self._shown(frame)
            if at is None or self._is_done():
                continue
            cell = self._grid.cell(at)
            if self._stop is not None and cell >= self._stop:
                self._wanted = self._stop
            elif cell >= self._wanted:
                self._wanted = cell + 1
                self._expected.discard(cell)
                self._taken += 1
                taken = True
                yield Sample(frame, at, cell)
        return taken

    def _decode(self, packet: Any | None) -> list[Any]:
        shown = None
        if packet is not None and not self._video.tells_when_shown and self._mode is SampleMode.FRAMES:
            shown = self._video.shown(packet)
        if shown is not None:
            heapq.heappush(self._fed, shown)
        try:
            return self._video.decode(packet)
        except FFmpegError as error:
            self._video.reraise(error)
            self._damage = first_line(error)
            if shown is not None:  # the packet gives no frame, so its time belongs to none
                self._fed.remove(shown)
                heapq.heapify(self._fed)
            return []

    def _shown(self, frame: Any) -> Fraction | None:
        """When a frame is shown; frames come from the decoder in the order of showing."""
        if self._video.tells_when_shown:
            return self._video.shown(frame)
        # The packets' times say when they are decoded. Sorted, they are the times of showing.
        return heapq.heappop(self._fed) if self._fed else None

    def _packets(self) -> Iterator[Any]:
        """Packets from a keyframe that is shown at or before the first wanted cell, or from the first of all."""
        start = self._grid.start(self._wanted)
        found = False
        if start > 0 and self._video.enterable:
            for margin in _MARGINS:
                at = start - margin
                if at <= 0 or not self._video.seek(at):
                    break
                packets = self._video.packets()
                keyframe = self._keyframe_until(packets, start)
                if keyframe is not None:
                    found = True
                    break
        if not found:
            self._video.restart()
            packets, keyframe = self._video.packets(), None
        yield from _forward(packets, keyframe, Fraction(self._video.stream.time_base))

    def _keyframe_until(self, packets: Iterator[Any], start: Fraction) -> Any | None:
        """The first keyframe, if it is shown at or before a time; looked for no further than that."""
        for packet in packets:
            self._tick()
            shown = self._video.shown(packet)
            if packet.is_keyframe:
                return packet if shown is not None and shown <= start else None
            if packet.dts is not None and self._video.seconds_of(packet.dts - self._video.start_pts) > start:
                return None
        return None

    # --- keyframes alone ---

    def _keyframes(self) -> Iterator[Sample]:
        video = self._video
        # Not with FFmpeg's `discard`, which would also skip reading the other packets: it gives keyframes wrong times.
        for packet in self._packets():
            at = self._see(packet)
            if at is None or not packet.is_keyframe:
                continue
            cell = self._grid.cell(at)
            if self._stop is not None and cell >= self._stop:
                self._wanted = self._stop
                return
            if cell < self._wanted:
                continue
            frames = self._decode(packet) + self._decode(None)
            video.stream.codec_context.flush_buffers()
            if frames:
                self._taken += 1
                self._wanted = cell + 1
                self._expected.discard(cell)
                yield Sample(frames[0], at, cell)


@dataclass(frozen=True, slots=True)
class _Ready:
    """Packets to decode now. fresh: they begin with a keyframe, and the decoder must be flushed before them."""

    packets: list[Any]
    fresh: bool = False


class _Gate:
    """Holds back packets that may turn out not to be needed.

    Once a cell has its frame, nothing is needed until the next cell begins. If a keyframe is shown before or at that
    time, decoding can begin with it, and all held packets are dropped. If a packet is shown in the wanted cell, all
    held packets must be decoded for it.
    """

    def __init__(self) -> None:
        self._held: list[Any] | None = None
        self._held_bytes = 0
        self._fresh = False

    def close(self) -> None:
        """The wanted cell has its frame: hold back the next packets."""
        self._held, self._held_bytes, self._fresh = [], 0, False

    def admit(self, packet: Any, shown: Fraction | None, wanted_from: Fraction) -> _Ready:
        """The packets to decode, now that this one was read."""
        if self._held is None:
            return _Ready([packet])
        if packet.is_keyframe and shown is not None and shown <= wanted_from:
            self._held, self._held_bytes, self._fresh = [], 0, True
        self._held.append(packet)
        self._held_bytes += packet.size
        if shown is not None and shown < wanted_from and self._held_bytes < _HELD_BYTES:
            return _Ready([])
        ready = _Ready(self._held, self._fresh)
        self._held = None
        return ready


def _forward(packets: Iterator[Any], first: Any | None, time_base: Fraction) -> Iterator[Any]:
    """The packets, `first` before the others. Raises `PermanentJobError` if their time runs backwards."""
    latest: int | None = None
    if first is not None:
        yield first
        latest = first.dts
    for packet in packets:
        if packet.dts is not None:
            if latest is not None and (latest - packet.dts) * time_base > _BACKWARD_SECONDS:
                seconds = float((latest - packet.dts) * time_base)
                raise PermanentJobError(
                    Reason.BROKEN_TIMESTAMPS,
                    f"its time stamps run backwards by {seconds:.1f} s, so the time of a frame is unknown; "
                    "write the video anew with continuous time stamps",
                )
            latest = packet.dts if latest is None else max(latest, packet.dts)
        yield packet
