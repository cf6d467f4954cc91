"""Writes a video again with its faces drawn or blurred, and finds the frame that is shown at a time.

Every frame is written at its own time, the sound is copied. Needs no database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.stream import Discard
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from common import files
from common.domain import Face, MaskStatus, MaskwatchError, ObjectInfo, SampleMode, VideoInfo, first_line
from common.settings import Settings
from workers.analysis.analyzer import ImageAnalyzer
from workers.analysis.tracking import FaceTracker
from workers.annotation.drawing import blur_faces, draw_faces
from workers.inference import runtime_of
from workers.media.containers import VideoFile
from workers.media.frames import to_rgb
from workers.media.opening import block_reader
from workers.media.prefetch import ahead
from workers.media.sampling import Grid, Sample, Sampler

#: FFmpeg's names of the sound codecs that players expect in an MP4. Sound is copied and never decoded.
SOUND_CODECS = frozenset({"aac", "mp3", "ac3", "eac3", "opus", "alac", "flac"})
#: A face that isn't found any more stays blurred for this many seconds, because detectors sometimes miss a face.
BLUR_SECONDS = Fraction(1, 2)

#: x264's constant quality, hardly different from the source. "veryfast", because finding the faces takes long enough.
_ENCODER = {"crf": "20", "preset": "veryfast"}
#: AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic of BT.709, and AVColorRange of video levels
#: (FFmpeg, libavutil/pixfmt.h).
_BT709, _VIDEO_LEVELS = 1, 1
#: Frame rate for the header of a video without a plausible one, and the highest plausible rate; the frames have their
#: own times.
_USUAL_RATE, _HIGHEST_RATE = Fraction(25), 1000
#: Sampling rates by their number in an ADTS header (ISO/IEC 14496-3, table 1.18).
_ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
#: How many packets of any kind are searched for such headers.
_ADTS_PACKETS = 1000
#: Seconds before a wanted time from which frames are searched, one after the other: a frame may be shown for long.
_MARGINS = (2, 16, 128)


@dataclass(frozen=True, slots=True)
class AnnotatedVideo:
    """The result of writing a video. faces: how often a face was found, by its status, in the analysed frames."""

    frames: int
    analysed: int
    seconds: float
    faces: Counter[MaskStatus]
    #: Codecs of the sound that was copied, and of the sound that an MP4 can't hold.
    sound: list[str]
    sound_left_out: list[str]
    #: Where the video ended too early, in seconds; None for a whole one.
    cut_off_at: float | None


@dataclass(frozen=True, slots=True)
class _Shown:
    """A frame in the order of showing. rgb: uint8 (height, width, 3), upright. at, lasts: seconds, exact."""

    rgb: NDArray[np.uint8]
    at: Fraction
    lasts: Fraction
    #: Whether this frame is analysed; otherwise the faces of the frame before stay.
    analysed: bool
    #: The packets of sound that were read along with it.
    sound: list[Any] = field(default_factory=list)


class SoundingVideo(VideoFile):
    """A video that also keeps the packets of sound that are read along with its frames."""

    def _open(self) -> None:
        super()._open()
        self._passed: list[Any] = []
        self.sounds = [stream for stream in self._container.streams.audio if _codec(stream) in SOUND_CODECS]
        for stream in self.sounds:
            stream.discard = Discard.default

    @property
    def sound_left_out(self) -> list[str]:
        """Codecs of the sound that can't be kept."""
        return [_codec(stream) for stream in self._container.streams.audio if _codec(stream) not in SOUND_CODECS]

    def packets(self) -> Iterator[Any]:
        self._untouched = False
        for packet in self._container.demux(self.stream, *self.sounds):
            if packet.size and packet.stream.index == self.stream.index:
                yield packet
            elif packet.size:
                self._passed.append(packet)

    def passed(self) -> list[Any]:
        """The packets of sound since the last call."""
        passed, self._passed = self._passed, []
        return passed

    def sound_rates(self) -> list[int]:
        """Samples per second of each sound; 0 if unknown. Goes back to the first packet.

        For AAC in an MPEG-TS the rate is only in the packets.
        """
        rates = {stream.index: int(stream.codec_context.sample_rate or 0) for stream in self.sounds}
        silent = {s.index for s in self.sounds if not rates[s.index] and _codec(s) == "aac"}
        if silent:
            self._untouched = False
            try:
                for packet, _ in zip(
                    self._container.demux(self.stream, *self.sounds), range(_ADTS_PACKETS), strict=False
                ):
                    if packet.stream.index in silent and (rate := _adts_rate(bytes(packet))):
                        rates[packet.stream.index] = rate
                        silent.remove(packet.stream.index)
                    if not silent:
                        break
            except FFmpegError:
                self.reraise()
            self.restart()
        return [rates[stream.index] for stream in self.sounds]


def _codec(stream: Any) -> str:
    context = stream.codec_context
    return str(context.codec.canonical_name) if context is not None else "unknown"


def _adts_rate(packet: bytes) -> int:
    """The sampling rate in the header that begins a packet of AAC, 0 if there is none."""
    if len(packet) < 7 or packet[0] != 0xFF or packet[1] & 0xF6 != 0xF0:
        return 0
    number = packet[2] >> 2 & 0xF
    return _ADTS_RATES[number] if number < len(_ADTS_RATES) else 0


def annotate_video(
    info: ObjectInfo,
    out: Path,
    analyzer: ImageAnalyzer,
    settings: Settings,
    *,
    sample_fps: float | None = None,
    blur: bool = False,
    begins: Callable[[float | None], None] = lambda seconds: None,
    reached: Callable[[float], None] = lambda seconds: None,
) -> AnnotatedVideo:
    """Write a video with its faces drawn to `out`, as H.264 in an MP4; the file appears when it is complete.

    sample_fps: analyse the first frame of each 1/sample_fps seconds, and show its boxes until the next one; None:
    every frame. blur: blur the faces under their boxes. begins, reached: called with the length of the video, or None,
    and with the time that was reached, in seconds.

    Raises `MaskwatchError` if `out` can't be written, otherwise as `workers.media.opening.opened` and `Sampler`.
    """
    with _sounding(info, settings) as video, new_file(out) as part:
        header = video.info()
        begins(header.duration_seconds)
        sound_rates = video.sound_rates()
        video.restart()
        writer = _begin(part, out, video, _Format.of(video, header, runtime_of(settings).threads), sound_rates)
        sampler = Sampler(video, _every_frame(video), SampleMode.FRAMES, 0, None)
        lately = _Lately(float(_rate(video)))
        faces: list[Face] = []
        analysed, counted, end = 0, Counter[MaskStatus](), Fraction(0)
        for group in ahead(
            _shown(video, sampler, None if sample_fps is None else Grid(Fraction(str(sample_fps)))),
            size_of=lambda shown: shown.rgb.nbytes,
            alike=lambda a, b: a.rgb.shape == b.rgb.shape,
            max_size=settings.worker.frame_buffer_bytes,
            max_items=settings.worker.batch_frames,
        ):
            to_analyse = [shown.rgb for shown in group if shown.analysed]
            found = iter(analyzer.analyze_batch(to_analyse) if to_analyse else [])
            for shown in group:
                if shown.analysed:
                    faces = next(found)
                    analysed += 1
                    counted.update(face.status for face in faces)
                hidden = [*faces, *lately.missing(faces, shown.at)] if blur else []
                writer.write_sound(shown.sound)
                writer.write(draw_faces(blur_faces(shown.rgb, hidden), faces), shown.at, shown.lasts)
                end = shown.at + shown.lasts
                reached(float(end))
        if not writer.frames:
            raise MaskwatchError(f"no frame of {info.uri} can be decoded; upload it again, whole")
        writer.write_sound(video.passed())
        writer.close()
        left_out = video.sound_left_out + writer.left_out
    cut_off_at = None if sampler.cut_off_at is None else float(sampler.cut_off_at)
    return AnnotatedVideo(writer.frames, analysed, float(end), counted, writer.kept, left_out, cut_off_at)


def frame_at(video: VideoFile, at: Fraction, length: Fraction | None, name: str, mode: SampleMode) -> Sample:
    """The frame that is shown `at` seconds from the start; with KEYFRAMES, the last keyframe until then.

    length: of the video, in seconds, if its header tells. name: of the video, for errors. Raises `MaskwatchError`
    for a time at which nothing is shown, because the video has ended or is cut off.
    """
    grid = _every_frame(video)
    # The header's end is only where the search begins: with a variable rate it may lie before the last frames.
    latest = at if length is None else min(at, length)
    for begin in [*(latest - margin for margin in _MARGINS if margin < latest), Fraction(0)]:
        sampler = Sampler(video, grid, mode, grid.cell(begin), None)
        found, following = _last_until(sampler, at)
        if found is None:
            continue
        end = sampler.cut_off_at
        if end is None:
            end = max(length or Fraction(0), found.at + _last_lasts(video, sampler, found))
        if following or at < end:
            return found
        length = end
        break
    lasts = "has no frame that can be decoded" if length is None else f"ends at {clock(length)}"
    raise MaskwatchError(f"nothing is shown at {clock(at)}: {name} {lasts}")


def _last_until(sampler: Sampler, at: Fraction) -> tuple[Sample | None, bool]:
    """The last of the frames that are shown at or before a time, and whether one follows."""
    found = None
    for sample in sampler:
        if sample.at > at:
            return found, True
        found = sample
    return found, False


def clock(seconds: Fraction | float) -> str:
    """A time in a video as people write it, and as `--at` takes it: 00:01:30 or 00:01:30.250."""
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    text = f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{text}.{milliseconds:03}" if milliseconds else text


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A temporary name beside `out` to write to; the file becomes `out` at the end, and is removed after an error."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"can't make the folder {out.parent}: {first_line(error)}") from error
    with ExitStack() as written:
        yield written.enter_context(files.replacing(out.absolute()))
        with _writing(out):
            written.close()


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FFmpegError) as error:
        raise MaskwatchError(f"can't write {out}: {first_line(error)}") from error


@contextmanager
def _sounding(info: ObjectInfo, settings: Settings) -> Iterator[SoundingVideo]:
    """As `workers.media.opening.opened`, but keeps the sound."""
    with block_reader(info, settings.storage) as reader:
        threads = runtime_of(settings).threads
        video = SoundingVideo(reader, max_pixels=settings.worker.max_frame_pixels, threads=threads)
        try:
            yield video
        finally:
            video.close()


def _every_frame(video: VideoFile) -> Grid:
    """A grid so fine that each frame has a cell of its own; of frames with the same time the first is taken."""
    return Grid(1 / Fraction(video.stream.time_base))


def _shown(video: SoundingVideo, sampler: Sampler, every: Grid | None) -> Iterator[_Shown]:
    """All frames; those to analyse are the first in each cell of `every`, or all if it is None."""
    latest = -1

    def shown(sample: Sample, lasts: Fraction) -> _Shown:
        nonlocal latest
        cell = sample.cell if every is None else every.cell(sample.at)
        analysed, latest = cell > latest, cell
        return _Shown(to_rgb(sample.frame), sample.at, lasts, analysed, video.passed())

    waiting: Sample | None = None
    for sample in sampler:
        if waiting is not None:
            yield shown(waiting, sample.at - waiting.at)
        waiting = sample
    if waiting is not None:
        yield shown(waiting, _last_lasts(video, sampler, waiting))


def _last_lasts(video: VideoFile, sampler: Sampler, last: Sample) -> Fraction:
    """How long the last frame is shown, in seconds."""
    end = video.end
    if sampler.cut_off_at is None and end is not None and end > last.at:
        return end - last.at
    return video.seconds_of(last.frame.duration) or 1 / _rate(video)


def _rate(video: VideoFile) -> Fraction:
    """Frames per second, about."""
    rate = video.stream.average_rate or video.stream.guessed_rate
    return Fraction(rate) if rate and 0 < rate <= _HIGHEST_RATE else _USUAL_RATE


class _Lately:
    """Remembers faces for `BLUR_SECONDS` after they were last found, so that they stay blurred if one is missed."""

    def __init__(self, frames_per_second: float) -> None:
        self._tracker = FaceTracker(frames_per_second)
        self._seen: dict[int, tuple[Fraction, Face]] = {}

    def missing(self, faces: Sequence[Face], at: Fraction) -> list[Face]:
        """The remembered faces that are missing among the faces of the next frame."""
        tracks = self._tracker.update(faces, float(at))
        lately = {track: seen for track, seen in self._seen.items() if at - seen[0] <= BLUR_SECONDS}
        self._seen = lately | {track: (at, face) for track, face in zip(tracks, faces, strict=True)}
        return [face for track, (_, face) in lately.items() if track not in tracks]


def _begin(
    part: Path, out: Path, video: SoundingVideo, video_format: _Format, sound_rates: Sequence[int]
) -> _Mp4Writer:
    """A writer with the video's sound, or without it if the sound's header is damaged and an MP4 can't hold it."""
    try:
        return _Mp4Writer(part, out, video, video_format, sound_rates)
    except MaskwatchError:
        # If the sound is not the cause, this fails again.
        return _Mp4Writer(part, out, video, video_format, [0] * len(sound_rates))


class _Mp4Writer:
    """Writes frames as H.264, and copies packets of sound."""

    def __init__(
        self, part: Path, out: Path, video: SoundingVideo, video_format: _Format, sound_rates: Sequence[int]
    ) -> None:
        """sound_rates: of the video's sounds; sounds with 0 are left out. Raises `MaskwatchError`."""
        self.frames = 0
        self.kept: list[str] = []
        self.left_out: list[str] = []
        self._out = out
        self._size = video_format.size
        self._time_base = Fraction(video.stream.time_base)
        self._start = video.start_pts * self._time_base
        #: How long frames that the encoder still holds are shown, by their times. In the time base.
        self._lasts: dict[int, int] = {}
        #: Index of a sound in the source → its stream here; and the time of its last packet.
        self._sounds: dict[int, Any] = {}
        self._latest: dict[int, int] = {}
        with _writing(out):
            # An absolute path, which can't be mistaken for a URL. The index goes to the front for browsers.
            self._file: Any = av.open(str(part.absolute()), "w", format="mp4", options={"movflags": "faststart"})
            self._stream: Any = self._file.add_stream("libx264", rate=_rate(video), options=dict(_ENCODER))
            self._set_up(video_format)
            for source, rate in zip(video.sounds, sound_rates, strict=True):
                self._add_sound(source, rate)
            self._file.start_encoding()

    def _set_up(self, video_format: _Format) -> None:
        encoder = self._stream.codec_context
        encoder.width, encoder.height = (side + side % 2 for side in self._size)
        encoder.pix_fmt = "yuv420p"
        encoder.time_base = self._time_base
        encoder.thread_count = video_format.threads
        # Without B-frames, frames are stored in the order of showing, and begin at 0 without an edit list, which some
        # players ignore.
        encoder.max_b_frames = 0
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = _BT709
        encoder.color_range = _VIDEO_LEVELS
        if video_format.aspect:
            encoder.sample_aspect_ratio = video_format.aspect

    def _add_sound(self, source: Any, rate: int) -> None:
        name = _codec(source)
        if not rate:
            self.left_out.append(name)
            return
        if source.codec_context.sample_rate:
            stream = self._file.add_stream_from_template(source)
        else:
            stream = self._file.add_mux_stream(name, rate=rate)
        self._sounds[source.index] = stream
        self.kept.append(name)

    def write(self, rgb: NDArray[np.uint8], at: Fraction, lasts: Fraction) -> None:
        """The next frame. at, lasts: when and for how long it is shown, in seconds."""
        frame = _video_frame(rgb, self._size)
        frame.time_base = self._time_base
        frame.pts = int(at / self._time_base)
        self._lasts[frame.pts] = max(1, round(lasts / self._time_base))
        self._encode(frame)
        self.frames += 1

    def _encode(self, frame: Any | None) -> None:
        with _writing(self._out):
            for packet in self._stream.encode(frame):
                # FFmpeg would take the duration from the average rate, and the last frame's would be wrong.
                packet.duration = self._lasts.pop(packet.pts)
                self._file.mux(packet)

    def write_sound(self, packets: Sequence[Any]) -> None:
        """Packets of the source's sounds, in their order, at their distance from the video's start."""
        for packet in packets:
            index = packet.stream.index
            if index not in self._sounds or packet.pts is None or packet.dts is None:
                continue
            shift = round(self._start / packet.time_base)
            pts, dts = packet.pts - shift, packet.dts - shift
            if pts + (packet.duration or 0) < 0 or dts <= self._latest.get(index, dts - 1):
                continue
            self._latest[index] = dts
            packet.pts, packet.dts, packet.stream = pts, dts, self._sounds[index]
            with _writing(self._out), suppress(ArgumentError, InvalidDataError):
                # A damaged packet is refused; the sound goes on after it.
                self._file.mux(packet)

    def close(self) -> None:
        self._encode(None)
        with _writing(self._out):
            self._file.close()


@dataclass(frozen=True, slots=True)
class _Format:
    """size: (width, height) of the frames. aspect: a pixel's width by its height; None if unknown."""

    size: tuple[int, int]
    aspect: Fraction | None
    threads: int

    @classmethod
    def of(cls, video: VideoFile, header: VideoInfo, threads: int) -> _Format:
        aspect = Fraction(video.stream.sample_aspect_ratio or 0) or None
        if header.rotation in (90, 270):
            return cls((header.height, header.width), 1 / aspect if aspect else None, threads)
        return cls((header.width, header.height), aspect, threads)


def _video_frame(rgb: NDArray[np.uint8], size: tuple[int, int]) -> Any:
    """The frame for the encoder: even sides, BT.709, scaled if the video's size has changed."""
    width, height = size
    if rgb.shape[:2] != (height, width):
        rgb = np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if width % 2 or height % 2:
        rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG, threads=1,
    )  # fmt: skip
    frame.colorspace = frame.color_primaries = frame.color_trc = _BT709
    frame.color_range = _VIDEO_LEVELS
    return frame
