"""Which frames are taken does not depend on how a video is cut into chunks, and is what the rule says."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.domain import PermanentJobError, Reason, SampleMode
from tests.videos import make_video, number_of
from workers.media.containers import VideoFile
from workers.media.frames import to_rgb
from workers.media.sampling import Grid, Sampler

FRAMES = 36


class Bytes(io.BytesIO):
    """A file in memory, as a reader of videos wants it."""

    error: Exception | None = None

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)


@dataclass(frozen=True)
class Recipe:
    """What a generated video is made from; equal ones are made once."""

    container: str = "mp4"
    codec: str = "libx264"
    fps: Fraction = Fraction(10)
    gop: int = 12
    bframes: int = 0
    #: Milliseconds from each frame to the next, in turn; none: a fixed rate.
    gaps_ms: tuple[int, ...] = ()
    start: Fraction = Fraction(0)
    options: tuple[tuple[str, str], ...] = field(default=())
    muxer: tuple[tuple[str, str], ...] = field(default=())

    @property
    def times(self) -> list[Fraction] | None:
        if not self.gaps_ms:
            return None
        gaps = [Fraction(self.gaps_ms[n % len(self.gaps_ms)], 1000) for n in range(FRAMES - 1)]
        return [sum(gaps[:n], Fraction(0)) for n in range(FRAMES)]


@lru_cache(maxsize=200)
def video(recipe: Recipe) -> bytes:
    return make_video(
        recipe.container,
        recipe.codec,
        FRAMES,
        fps=recipe.fps,
        gop=recipe.gop,
        bframes=recipe.bframes,
        times=recipe.times,
        start=recipe.start,
        options=dict(recipe.options),
        muxer=dict(recipe.muxer),
    )


def opened(data: bytes) -> VideoFile:
    return VideoFile(Bytes(data), max_pixels=10**6, threads=1)


Taken = list[tuple[int, Fraction, int]]


def chunk(data: bytes, grid: Grid, start_ms: int, end_ms: int | None, mode: SampleMode = SampleMode.FRAMES) -> Taken:
    """(cell, time, number in the picture) of what one chunk takes."""
    file = opened(data)
    sampler = Sampler(file, grid, mode, grid.first_from(start_ms), None if end_ms is None else grid.first_from(end_ms))
    taken = [(sample.cell, sample.at, number_of(to_rgb(sample.frame))) for sample in sampler]
    assert sampler.cut_off_at is None
    file.close()
    return taken


def in_chunks(data: bytes, grid: Grid, length_ms: int, mode: SampleMode = SampleMode.FRAMES) -> Taken:
    """What all chunks take, as they are planned: the last goes on to the end."""
    file = opened(data)
    duration_ms = float(file.info().duration_seconds or 0) * 1000
    file.close()
    starts = list(range(0, max(1, int(duration_ms)), length_ms))
    ends = [*starts[1:], None]
    return [each for start, end in zip(starts, ends, strict=True) for each in chunk(data, grid, start, end, mode)]


def by_the_rule(data: bytes, grid: Grid) -> Taken:
    """The rule, written out over a plain decode of everything: of each cell the first frame that is shown in it."""
    file = opened(data)
    times: list[Fraction | None] = []
    frames: list[Any] = []
    for packet in file.packets():
        times.append(file.shown(packet))
        frames += packet.decode()
    frames += file.stream.codec_context.decode(None)
    if file.tells_when_shown:
        times = [file.shown(frame) for frame in frames]
    # An AVI's times are those of decoding; in their order they are those of showing.
    shown = [(at, number_of(to_rgb(frame))) for at, frame in zip(sorted(filter_none(times)), frames, strict=True)]
    file.close()
    first: dict[int, tuple[Fraction, int]] = {}
    for at, number in shown:
        first.setdefault(grid.cell(at), (at, number))
    return [(cell, *first[cell]) for cell in sorted(first)]


def filter_none(times: Sequence[Fraction | None]) -> list[Fraction]:
    return [at for at in times if at is not None]


RECIPES = st.builds(
    Recipe,
    container=st.sampled_from(["mp4", "mov", "matroska", "mpegts"]),
    fps=st.sampled_from([Fraction(5), Fraction(10), Fraction(30000, 1001)]),
    gop=st.sampled_from([1, 5, 12, 250]),
    bframes=st.sampled_from([0, 2, 3]),
    gaps_ms=st.one_of(
        st.just(()), st.lists(st.sampled_from([20, 40, 100, 270, 1900]), min_size=2, max_size=6).map(tuple)
    ),
    start=st.sampled_from([Fraction(0), Fraction(7, 5), Fraction(100)]),
    options=st.sampled_from([(), (("x264-params", "open-gop=1:keyint=9"),)]),
)
RATES = st.sampled_from(["0.3", "1", "2", "7.5", "29.97", "60"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(recipe=RECIPES, rate=RATES, length_ms=st.sampled_from([200, 333, 1000, 1700, 5000]))
def test_every_chunk_length_takes_what_the_rule_says(recipe: Recipe, rate: str, length_ms: int) -> None:
    data, grid = video(recipe), Grid(Fraction(rate))
    expected = by_the_rule(data, grid)
    assert chunk(data, grid, 0, None) == expected
    assert in_chunks(data, grid, length_ms) == expected


OTHERS = [
    Recipe("webm", "libvpx-vp9"),
    Recipe("mp4", "libx265", bframes=3),
    Recipe("mp4", "libsvtav1"),
    Recipe("avi", "mjpeg"),
    Recipe("avi", "mpeg4", bframes=2),
    Recipe("avi", "libx264", bframes=2, gop=9),
    Recipe("gif", "gif"),
    Recipe("matroska", "mjpeg"),
    # As many cameras write it: in fragments, without an index.
    Recipe("mp4", bframes=2, muxer=(("movflags", "frag_keyframe+empty_moov+default_base_moof"),)),
]


@pytest.mark.parametrize(
    "recipe", OTHERS, ids=lambda recipe: f"{recipe.container}-{recipe.codec}{'-f' * bool(recipe.muxer)}"
)
def test_other_codecs_and_containers_follow_the_rule_too(recipe: Recipe) -> None:
    data = video(recipe)
    for rate in ("1", "3", "10"):
        grid = Grid(Fraction(rate))
        expected = by_the_rule(data, grid)
        assert len(expected) >= FRAMES / 10 * float(rate) * 0.9
        for length_ms in (400, 1500):
            assert in_chunks(data, grid, length_ms) == expected


def test_a_cell_belongs_to_the_chunk_that_contains_its_start() -> None:
    grid = Grid(Fraction("0.3"))  # cells begin at 0, 3.33, 6.67
    assert [grid.first_from(ms) for ms in (0, 1, 3333, 3334, 6666, 6667)] == [0, 1, 1, 2, 2, 3]
    assert (grid.start(2), grid.cell(Fraction(20, 3)), grid.cell(Fraction("6.666"))) == (Fraction(20, 3), 2, 1)


def test_cells_without_a_frame_stay_empty() -> None:
    data = video(Recipe(gaps_ms=(100, 3000)))
    cells = [cell for cell, _, _ in chunk(data, Grid(Fraction(1)), 0, None)][:4]
    assert cells == [0, 3, 6, 9]


def test_the_first_chunk_begins_with_the_first_frame_whatever_its_time_stamp() -> None:
    data = video(Recipe(start=Fraction(100)))
    assert chunk(data, Grid(Fraction(1)), 0, 1000) == [(0, Fraction(0), 0)]


# --- keyframes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("length_ms", [300, 1000, 2500, 60_000])
def test_of_the_keyframes_the_first_in_each_cell_is_taken(container: str, length_ms: int) -> None:
    # Keyframes each half second: of two in a cell the first, in whatever chunk.
    data = video(Recipe(container, gop=5, bframes=2, options=(("x264-params", "scenecut=0"),)))
    taken = in_chunks(data, Grid(Fraction(1)), length_ms, SampleMode.KEYFRAMES)
    assert [number for _, _, number in taken] == [0, 10, 20, 30]
    assert [cell for cell, _, _ in taken] == [0, 1, 2, 3]


def test_of_cells_without_a_keyframe_nothing_is_taken() -> None:
    data = video(Recipe(gop=250, options=(("x264-params", "scenecut=0"),)))
    assert [number for _, _, number in in_chunks(data, Grid(Fraction(2)), 1000, SampleMode.KEYFRAMES)] == [0]


class Counting:
    """Counts the packets that a decoder gets."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.packets = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self, packet: Any) -> list[Any]:
        self.packets += packet is not None
        found: list[Any] = self._context.decode(packet)
        return found


def decoded_packets(
    data: bytes, grid: Grid, monkeypatch: pytest.MonkeyPatch, mode: SampleMode, start_ms: int = 0
) -> int:
    file = opened(data)
    sampler = Sampler(file, grid, mode, grid.first_from(start_ms), None)
    counter = Counting(file.stream.codec_context)
    decode = sampler._decode

    def counted(packet: Any) -> list[Any]:
        counter.packets += packet is not None
        return decode(packet)

    monkeypatch.setattr(sampler, "_decode", counted)
    assert list(sampler)
    return counter.packets


def test_keyframes_alone_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(Recipe(gop=12, bframes=2, options=(("x264-params", "scenecut=0"),)))
    assert decoded_packets(data, Grid(Fraction(1)), monkeypatch, SampleMode.KEYFRAMES) == 3


def test_what_lies_between_a_sample_and_the_next_keyframe_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    # A keyframe each second and a sample each second: nothing else needs to be decoded.
    data = video(Recipe(gop=10, options=(("x264-params", "scenecut=0"),)))
    assert decoded_packets(data, Grid(Fraction(1)), monkeypatch, SampleMode.FRAMES) <= 8
    # The control: with one keyframe for all, each packet is needed up to the last sample.
    data = video(Recipe(gop=250, options=(("x264-params", "scenecut=0"),)))
    assert decoded_packets(data, Grid(Fraction(1)), monkeypatch, SampleMode.FRAMES) >= 31


# --- damage -----------------------------------------------------------------------------------------------


def sampled(data: bytes, mode: SampleMode = SampleMode.FRAMES) -> tuple[list[int], Fraction | None]:
    sampler = Sampler(opened(data), Grid(Fraction(10)), mode, 0, None)
    return [sample.cell for sample in sampler], sampler.cut_off_at


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_whole_file_is_not_cut_off_and_half_of_one_is(container: str) -> None:
    options = {"movflags": "faststart"} if container == "mp4" else {}
    data = make_video(container, frames=100, size=(160, 120), muxer=options)
    cells, cut_off_at = sampled(data)
    assert (len(cells), cut_off_at) == (100, None)
    cells, cut_off_at = sampled(data[: len(data) * 6 // 10])
    if container == "mpegts":
        # Such a file ends wherever it ends: its header says nothing of its length.
        assert cut_off_at is None and 30 < len(cells) < 90
    else:
        assert cut_off_at is not None and 2 < cut_off_at < 9
        assert len(cells) == pytest.approx(cut_off_at * 10, abs=4)


def test_time_that_runs_backwards_is_refused() -> None:
    first, second = (make_video("mpegts", frames=30, start=start) for start in (60, 0))
    file = opened(first + second)
    with pytest.raises(PermanentJobError) as caught:
        list(Sampler(file, Grid(Fraction(1)), SampleMode.FRAMES, 0, None))
    assert caught.value.reason is Reason.BROKEN_TIMESTAMPS


def test_a_file_in_which_nothing_decodes_says_so() -> None:
    data = bytearray(make_video("matroska", codec="mjpeg", frames=8, size=(160, 120)))
    for start in _frames_in(data):
        data[start : start + 400] = b"\xff" * 400
    with pytest.raises(PermanentJobError, match="no frame of it can be decoded") as caught:
        sampled(bytes(data))
    assert caught.value.reason is Reason.UNREADABLE_VIDEO


def zeroed(data: bytes, start: float, end: float) -> bytes:
    """A faststart MP4 of 20 s whose pictures between two times are zeros, about."""
    payload = data.find(b"mdat") + 8
    first, last = (payload + int((len(data) - payload) * at / 20) for at in (start, end))
    return data[:first] + bytes(last - first) + data[last:]


def test_what_cannot_be_decoded_in_the_middle_is_told_and_not_read_beyond() -> None:
    whole = make_video("mp4", frames=200, gop=10, size=(160, 120), muxer={"movflags": "faststart"})
    data = zeroed(whole, 5, 20)
    packets = []

    def sampler(first: int, stop: int | None) -> Sampler:
        packets.clear()
        return Sampler(
            opened(data), Grid(Fraction(1)), SampleMode.FRAMES, first, stop, tick=lambda: packets.append(None)
        )

    before = sampler(0, 3)
    assert ([sample.cell for sample in before], before.undecodable) == ([0, 1, 2], 0)
    across = sampler(2, 9)
    taken = [sample.cell for sample in across]
    assert taken[:2] == [2, 3] and 0 < across.undecodable == 7 - len(taken)
    assert len(packets) < 110, "the chunk ends where its packets end, and not where something can be decoded again"
    with pytest.raises(PermanentJobError, match="no frame of it can be decoded"):
        list(sampler(10, 13))


def test_what_the_tick_raises_ends_the_work() -> None:
    class Enough(Exception):
        pass

    def tick() -> None:
        raise Enough

    with pytest.raises(Enough):
        list(Sampler(opened(video(Recipe())), Grid(Fraction(1)), SampleMode.FRAMES, 0, None, tick=tick))


@pytest.mark.parametrize("duration", ["00:00:000000001/00", "00:00:1e3000000", "nonsense", "00:00:05.000000000"])
def test_a_length_that_is_text_is_read_with_care(duration: str) -> None:
    data = make_video("matroska", frames=50)
    written = b"00:00:05.000000000"
    assert data.count(written) == 1
    file = opened(data.replace(written, duration.encode().ljust(len(written), b"\0")))
    assert file.end == 5


def _frames_in(data: bytearray) -> Iterator[int]:
    """Where JPEG pictures begin."""
    position = data.find(b"\xff\xd8\xff")
    while position >= 0:
        yield position
        position = data.find(b"\xff\xd8\xff", position + 3)
