"""Bad videos: each kind says what was wrong and up to where it was analysed, ends in the ledger with its reason,
and the rest goes on. Nothing that a file refers to is ever opened."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from common import ledger
from common.domain import Face, MaskStatus, ObservedAt, ObservedAtSource, PermanentJobError, SampleMode
from common.planning import PlannedObject, media_kind
from common.settings import Settings, get_settings
from common.storage.opening import open_bucket
from tests import ROOT
from tests.faults import faulty_s3
from tests.hostile_files import (
    DREF,
    FRAMES,
    RATE,
    STBL,
    Canaries,
    alias_to,
    claims,
    edited,
    hls,
    mjpeg,
    open_freely,
    scan_bomb,
    sps,
    url_of,
    video,
    watch_canaries,
    with_sps,
)
from tests.ledger_rows import NOON, dispatch, register, rows, scalar
from tests.photos import empty_jpeg
from tests.services import Bucket, Services
from tests.videos import index_first, make_video, number_of, numbered
from workers.jobs import models
from workers.jobs.run import run_jobs
from workers.media.containers import VideoFile, _deny
from workers.media.frames import to_rgb
from workers.media.sampling import Grid, Sampler

#: Of the frames of `video` every fifth is looked at, and each chunk has 2 s.
EVERY, CHUNK_SECONDS = 5, 2
ALL = list(range(0, FRAMES, EVERY))


@dataclass
class FakeAnalyzer:
    """Finds one face in each picture, whose left edge is the picture's number, -1 for one that tells none."""

    while_analyzing: dict[int, Callable[[], None]] = field(default_factory=dict)

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        return self.analyze_batch([image_rgb])[0]

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        return [[self._face(rgb)] for rgb in frames_rgb]

    def _face(self, rgb: NDArray[np.uint8]) -> Face:
        try:
            number = number_of(rgb)
        except ValueError:
            number = -1
        self.while_analyzing.get(number, lambda: None)()
        return Face(number, 10, number + 40, 50, 0.8, 0.9, 0.1, MaskStatus.WITH_MASK)


@pytest.fixture
def analyzer(monkeypatch: pytest.MonkeyPatch) -> FakeAnalyzer:
    fake = FakeAnalyzer()
    monkeypatch.setattr(models, "analyzer", lambda spec, runtime: fake)
    return fake


Configure = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _ready(configure: Configure, analyzer: FakeAnalyzer) -> None:
    """All tests here have the settings and the analyser."""
    configure(
        worker__chunk_seconds=CHUNK_SECONDS,
        pipeline__sample_fps=RATE / EVERY,
        worker__threads=1,
        storage__block_bytes=4096,
        worker__max_frame_pixels=1_000_000,
    )


# --- videos, whole and otherwise ---


def grainy(number: int) -> NDArray[np.uint8]:
    """A numbered picture that takes some kilobytes, so that a video has many blocks."""
    grain = np.random.default_rng(number).integers(-30, 30, (120, 160, 3))
    return np.clip(numbered(number, (160, 120)).astype(int) + grain, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def large_video() -> bytes:
    fine = {"qmin": "1", "qmax": "1"}
    content = make_video("avi", "mjpeg", FRAMES, fps=RATE, size=(160, 120), image=grainy, options=fine)
    assert len(content) > 60 * 4096
    return content


def cut_at(content: bytes, seconds: float) -> bytes:
    """The file up to the middle of the first packet from that time on."""
    with av.open(io.BytesIO(content)) as file:
        stream = file.streams.video[0]
        for packet in file.demux(stream):
            if packet.size and (packet.dts - (stream.start_time or 0)) * stream.time_base >= seconds:
                return content[: packet.pos + packet.size // 2]
    raise AssertionError(f"the video is shorter than {seconds} s")


def without_samples(mp4: bytes) -> bytes:
    """An MP4 whose video track has no frames, with everything else in place."""
    for kind, body in (
        (b"stsz", struct.pack(">III", 0, 0, 0)),
        (b"stts", struct.pack(">II", 0, 0)),
        (b"stsc", struct.pack(">II", 0, 0)),
        (b"stco", struct.pack(">II", 0, 0)),
        (b"stss", struct.pack(">II", 0, 0)),
    ):
        mp4 = edited(mp4, (*STBL, kind), lambda _, body=body: body)  # type: ignore[misc]
    return mp4


# --- the ledger ---


def put(session: Session, bucket: Bucket, **contents: bytes) -> None:
    """Put objects into the bucket, and register them; in their names "__" stands for the dot."""
    for name, content in contents.items():
        plan(session, bucket, name.replace("__", "."), content)


def plan(session: Session, bucket: Bucket, key: str, content: bytes) -> None:
    bucket.put(key, content)
    kind = media_kind(key)
    assert kind is not None
    found = open_bucket(bucket.uri).stat(key)
    register(session, PlannedObject(found, kind, ObservedAt(NOON, ObservedAtSource.KEY_PATTERN)))


def work_off(session: Session) -> None:
    """Do in this process what a worker would do, until nothing is pending; all that waits in one message."""
    while refs := dispatch(session, limit=200):
        run_jobs(refs, worker="test/1", settings=get_settings())


@dataclass(frozen=True)
class Ended:
    kind: str
    start_ms: int
    state: str
    reason: str | None
    detail: str | None


def ended(session: Session) -> dict[str, list[Ended]]:
    """The jobs of each key in their order. A detail is one line, and names the object."""
    found: dict[str, list[Ended]] = {}
    query = (
        "SELECT m.bucket || '/' || m.key AS uri, m.key, j.kind, j.range_start_ms, j.state, j.reason, j.detail"
        " FROM jobs j JOIN media_objects m ON m.id = j.media_object_id ORDER BY j.id"
    )
    for row in rows(session, query):
        if row.detail is not None and row.state != "cancelled":
            assert row.uri in row.detail and "\n" not in row.detail
        found.setdefault(row.key, []).append(Ended(row.kind, row.range_start_ms, row.state, row.reason, row.detail))
    return found


def outcomes(session: Session, key: str) -> list[tuple[str, str, str | None]]:
    """(kind, state, reason) of the jobs of a key."""
    return [(job.kind, job.state, job.reason) for job in ended(session)[key]]


def reason_of(session: Session, key: str) -> str | None:
    """Why the one job of a key was quarantined."""
    ((_, state, reason),) = outcomes(session, key)
    assert state == "quarantined"
    return reason


def seen(session: Session, key: str) -> list[int]:
    """The numbers of the frames of a key whose faces are recorded, by their time."""
    query = (
        "SELECT f.x1 FROM faces f JOIN media_objects m ON m.id = f.media_object_id"
        " WHERE m.key = :key ORDER BY f.observed_at"
    )
    numbers = [round(row.x1) for row in rows(session, query, key=key)]
    counted = scalar(
        session,
        "SELECT coalesce(sum(c.frames), 0) FROM frame_counts c JOIN jobs j ON j.id = c.job_id"
        " JOIN media_objects m ON m.id = j.media_object_id WHERE m.key = :key",
        key=key,
    )
    assert counted == len(numbers)
    return numbers


WHOLE = [("probe", "succeeded", None), *[("chunk", "succeeded", None)] * 3]


def check_whole(session: Session, *keys: str) -> None:
    for key in keys:
        assert outcomes(session, key) == WHOLE, key
        assert seen(session, key) == ALL, key


def test_whole_videos_are_analysed(session: Session, bucket: Bucket) -> None:
    put(
        session,
        bucket,
        a__mp4=video(),
        b__mkv=video("matroska", bframes=2),
        c__avi=video("avi", "mjpeg"),
        d__ts=video("mpegts"),
        e__gif=video("gif", "gif"),
        f__jpg=empty_jpeg(),
    )
    work_off(session)
    check_whole(session, "a.mp4", "b.mkv", "c.avi", "d.ts", "e.gif")
    assert outcomes(session, "f.jpg") == [("image", "succeeded", None)]


# --- cut off ---


def test_of_a_truncated_video_what_decodes_is_analysed(session: Session, bucket: Bucket) -> None:
    whole = {
        "a.mp4": index_first(video()),
        "b.mkv": video("matroska"),
        "c.webm": video("webm", "libvpx-vp9"),
        "d.avi": video("avi", "mjpeg"),
    }
    for key, content in whole.items():
        plan(session, bucket, key, cut_at(content, 2.8))
    # These tell no length but the one that is there.
    plan(session, bucket, "e.ts", cut_at(video("mpegts"), 2.8))
    gif = video("gif", "gif")
    plan(session, bucket, "f.gif", gif[: len(gif) // 2])
    plan(session, bucket, "good.mp4", video())
    work_off(session)
    check_whole(session, "good.mp4")
    for key in whole:
        first, second, third = ended(session)[key][1:]
        assert (first.state, first.reason) == ("succeeded", None), key
        # The damaged frame itself is none of those that are looked at.
        assert seen(session, key) == [0, 5, 10, 15, 20, 25], key
        assert (second.state, second.reason) == ("succeeded", "truncated_video"), key
        assert second.detail is not None
        assert "up to 0:00:02." in second.detail and "of 0:00:06" in second.detail and "until there" in second.detail
        assert (third.state, third.reason) == ("quarantined", "truncated_video"), key
        assert third.detail is not None and "before this chunk" in third.detail and "upload it again" in third.detail
    for key in ("e.ts", "f.gif"):
        assert outcomes(session, key) == WHOLE[:3], key
    assert seen(session, "e.ts") == [0, 5, 10, 15, 20, 25]
    assert seen(session, "f.gif") in ([0, 5, 10, 15, 20, 25], [0, 5, 10, 15, 20, 25, 30])


def test_an_mp4_without_its_index(session: Session, bucket: Bucket) -> None:
    plan(session, bucket, "cut.mp4", cut_at(video(), 5))
    plan(session, bucket, "half.mp4", video()[:-900])
    plan(session, bucket, "good.mp4", video())
    work_off(session)
    check_whole(session, "good.mp4")
    for key in ("cut.mp4", "half.mp4"):
        assert reason_of(session, key) == "unreadable_video"
        (probe,) = ended(session)[key]
        assert probe.detail is not None and "index (the moov box) is missing" in probe.detail


# --- no video, no frames ---


def test_sound_alone_and_nothing_at_all(session: Session, bucket: Bucket) -> None:
    sound = {
        f"sound.{suffix}": make_video(container, frames=10, video=False, audio=True)
        for suffix, container in (
            ("mp4", "mp4"), ("mov", "mov"), ("mkv", "matroska"), ("webm", "webm"), ("avi", "avi"), ("ts", "mpegts"),
        )
    }  # fmt: skip
    blank = {
        "header.avi": make_video("avi", "mjpeg", 0),
        "blank.mp4": without_samples(video()),
        "blank.gif": b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0, 0, 0) + b";",
    }
    for key, content in {**sound, **blank}.items():
        plan(session, bucket, key, content)
    put(session, bucket, nothing__mp4=b"", good__mp4=video(audio=True), header__mkv=make_video("matroska", frames=0))
    work_off(session)
    check_whole(session, "good.mp4")
    for key in sound:
        assert reason_of(session, key) == "no_video_stream", key
    for key in blank:
        assert reason_of(session, key) == "empty_video", key
    assert reason_of(session, "nothing.mp4") == "empty_file"
    # A header and nothing behind it: nobody can tell it from one that was cut off.
    assert reason_of(session, "header.mkv") == "unreadable_video"


def test_a_video_that_tells_no_length(session: Session, bucket: Bucket) -> None:
    # One frame that is shown for no time, and a length of 0 in the header.
    one = edited(make_video(frames=1), (b"moov", b"mvhd"), lambda body: body[:16] + bytes(4) + body[20:])
    live = make_video("matroska", frames=FRAMES, fps=RATE, gop=5, muxer={"live": "1"})
    put(session, bucket, one__mp4=one, live__mkv=live)
    work_off(session)
    assert outcomes(session, "one.mp4") == WHOLE[:2] and seen(session, "one.mp4") == [0]
    assert outcomes(session, "live.mkv") == WHOLE[:2] and seen(session, "live.mkv") == ALL


# --- other content than the name says ---


def test_the_content_decides_what_a_file_is(session: Session, bucket: Bucket) -> None:
    put(
        session,
        bucket,
        really_mkv__mp4=video("matroska"),
        really_ts__avi=video("mpegts"),
        picture__mp4=empty_jpeg(),
        text__mp4=b"The camera was off today.\n" * 100,
        page__webm=b"<!doctype html><title>403</title>",
        zeros__ts=bytes(5000),
        video__jpg=video(),
        good__jpg=empty_jpeg(),
    )
    work_off(session)
    check_whole(session, "really_mkv.mp4", "really_ts.avi")
    for key in ("picture.mp4", "text.mp4", "page.webm", "zeros.ts"):
        assert reason_of(session, key) == "unreadable_video", key
    assert reason_of(session, "video.jpg") == "unreadable_image"
    assert outcomes(session, "good.jpg") == [("image", "succeeded", None)]


def test_codecs_that_are_not_decoded_here(session: Session, bucket: Bucket) -> None:
    unknown = edited(video(), (*STBL, b"stsd"), lambda body: body.replace(b"avc1", b"zzzz", 1))
    put(
        session,
        bucket,
        archive__mkv=video("matroska", "ffv1"),
        old__mkv=make_video("matroska", "mpeg1video", FRAMES, fps=25),
        cut__mov=video("mov", "prores", pixels="yuv422p10le"),
        unknown__mp4=unknown,
        good__mkv=video("matroska"),
    )
    work_off(session)
    check_whole(session, "good.mkv")
    for key, name in (("archive.mkv", "ffv1"), ("old.mkv", "mpeg1video"), ("cut.mov", "prores"), ("unknown.mp4", "")):
        assert reason_of(session, key) == "unsupported_codec", key
        (probe,) = ended(session)[key]
        assert probe.detail is not None and name in probe.detail and "H.264" in probe.detail


# --- times ---


def test_a_video_that_is_too_long(session: Session, bucket: Bucket, configure: Configure) -> None:
    configure(worker__max_video_seconds=5.9)
    put(session, bucket, long__mp4=video(), short__mp4=make_video(frames=50, fps=RATE, gop=5))
    work_off(session)
    assert reason_of(session, "long.mp4") == "video_too_long"
    (probe,) = ended(session)["long.mp4"]
    assert probe.detail is not None and "MASKWATCH_WORKER__MAX_VIDEO_SECONDS" in probe.detail
    assert seen(session, "short.mp4") == ALL[:10]


def test_a_video_of_more_bytes_than_allowed_is_not_read(session: Session, bucket: Bucket, configure: Configure) -> None:
    plan(session, bucket, "large.mp4", video())
    configure(storage__max_video_bytes=len(video()) - 1)
    work_off(session)
    assert reason_of(session, "large.mp4") == "object_too_large"
    (probe,) = ended(session)["large.mp4"]
    assert probe.detail is not None and "MASKWATCH_STORAGE__MAX_VIDEO_BYTES" in probe.detail


def test_more_frames_or_faces_in_a_job_than_allowed(session: Session, bucket: Bucket, configure: Configure) -> None:
    configure(worker__max_frames=3)
    plan(session, bucket, "dense.mp4", video())
    work_off(session)
    # The 2 s of a chunk have four frames to look at.
    assert outcomes(session, "dense.mp4") == [WHOLE[0], *[("chunk", "quarantined", "video_too_long")] * 3]
    configure(worker__max_frames=4, worker__max_faces=1)
    plan(session, bucket, "fits.mp4", video() + bytes(8))
    plan(session, bucket, "fits.jpg", empty_jpeg())
    work_off(session)
    check_whole(session, "fits.mp4")
    assert outcomes(session, "fits.jpg") == [("image", "succeeded", None)]


def test_a_video_that_asks_for_more_memory_than_there_is(
    session: Session, bucket: Bucket, configure: Configure
) -> None:
    configure(ledger__retry_base_seconds=0.01)
    # An stts box of 2**32 - 1 runs.
    claim = edited(video(), (*STBL, b"stts"), lambda body: body[:4] + b"\xff\xff\xff\xff" + body[8:])
    plan(session, bucket, "runs.mp4", claim)
    work_off(session)
    assert outcomes(session, "runs.mp4") == [("probe", "retry_wait", "unexpected_error")]
    time.sleep(0.05)
    ledger.wake_retries(session, limit=100)
    work_off(session)
    assert reason_of(session, "runs.mp4") == "unreadable_video"


def test_a_few_bytes_that_claim_days_are_few_jobs(session: Session, bucket: Bucket) -> None:
    claim = make_video("matroska", times=[0, 1, 4 * 86400])
    plan(session, bucket, "days.mkv", claim)
    work_off(session)
    # One each 2 s would be 170,000.
    assert 1 < scalar(session, "SELECT count(*) FROM jobs") <= len(claim) / 256 + 2
    assert seen(session, "days.mkv") == [0, 1, 2]


def test_frames_in_very_many_passes_are_not_decoded(session: Session, bucket: Bucket) -> None:
    put(
        session,
        bucket,
        first__avi=mjpeg(scan_bomb(101), scan_bomb(10)),
        second__avi=mjpeg(scan_bomb(10), scan_bomb(101)),
        good__avi=mjpeg(scan_bomb(100), scan_bomb(10)),
    )
    work_off(session)
    assert reason_of(session, "first.avi") == "frame_too_large"
    assert outcomes(session, "second.avi") == [WHOLE[0], ("chunk", "quarantined", "frame_too_large")]
    assert outcomes(session, "good.avi") == WHOLE[:2]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_times_that_jump_forward_leave_empty_cells(session: Session, bucket: Bucket, container: str) -> None:
    times = [Fraction(n, 10) + (4 if n >= 10 else 0) for n in range(20)]  # 0 to 0.9 s and 5 to 5.9 s
    suffix = {"mp4": "mp4", "matroska": "mkv", "mpegts": "ts"}[container]
    plan(session, bucket, f"gap.{suffix}", make_video(container, times=times, gop=5))
    work_off(session)
    assert outcomes(session, f"gap.{suffix}") == WHOLE
    assert seen(session, f"gap.{suffix}") == [0, 5, 10, 15]
    seconds = [row.offset_seconds for row in rows(session, "SELECT offset_seconds FROM faces ORDER BY observed_at")]
    assert seconds == pytest.approx([0, 0.5, 5, 5.5], abs=0.001)


def recording(start: float, frames: int = 50) -> bytes:
    return make_video("mpegts", frames=frames, fps=RATE, gop=5, start=start)


def test_times_that_run_backwards(session: Session, bucket: Bucket) -> None:
    # Recordings joined byte by byte: the clock of the second is behind, or is set anew.
    put(
        session,
        bucket,
        behind__ts=recording(100) + recording(99),
        anew__ts=recording(100) + recording(0),
        little__ts=recording(100) + recording(103),
        gap__ts=recording(100) + recording(110),
        # The ticks of the clock end after 26.5 hours, and begin anew.
        night__ts=recording(2**33 / 90000 - 2),
    )
    work_off(session)
    for key in ("behind.ts", "anew.ts", "little.ts"):
        assert reason_of(session, key) == "broken_timestamps", key
        (probe,) = ended(session)[key]
        assert probe.detail is not None and "clock is set back" in probe.detail
    assert seen(session, "gap.ts") == ALL[:10] * 2
    assert seen(session, "night.ts") == ALL[:10]


def test_times_that_run_backwards_where_a_probe_does_not_look(
    session: Session, bucket: Bucket, configure: Configure
) -> None:
    # A short recording between two of the places whose clocks are compared.
    configure(worker__chunk_seconds=60)
    put(session, bucket, step__ts=recording(100, 200) + recording(117.8, 3) + recording(120, 97), good__ts=recording(9))
    work_off(session)
    probe, chunk = ended(session)["step.ts"]
    assert probe.state == "succeeded"
    assert (chunk.state, chunk.reason) == ("quarantined", "broken_timestamps")
    assert "run backwards by 2." in str(chunk.detail)
    assert seen(session, "step.ts") == [] and seen(session, "good.ts") == ALL[:10]


# --- claims ---


def test_a_parameter_set_that_is_written_here_works() -> None:
    with av.open(io.BytesIO(with_sps(video(), sps(64, 48)))) as file:
        assert [number_of(to_rgb(frame)) for frame in file.decode(video=0)] == list(range(FRAMES))


def test_enormous_frames_end_in_the_ledger(session: Session, bucket: Bucket) -> None:
    for key, content in claims().items():
        plan(session, bucket, key, content)
    put(session, bucket, good__avi=video("avi", "mjpeg"))
    work_off(session)
    # Where the frames themselves are small, the header's claim does no harm.
    check_whole(session, "good.avi", "header.avi", "track.mp4")
    assert seen(session, "track.mkv") == ALL[:4]
    assert reason_of(session, "wide.mp4") == "frame_too_large"
    for key in ("both.avi", "screen.gif", "both.mp4", "both.mkv"):
        assert reason_of(session, key) == "unreadable_video", key
        (probe,) = ended(session)[key]
        assert probe.detail is not None and "MASKWATCH_WORKER__MAX_FRAME_PIXELS" in probe.detail
    for key in ("frames.avi", "stream.mp4"):
        assert outcomes(session, key) == [WHOLE[0], *[("chunk", "quarantined", "unreadable_video")] * 3]


#: Opens a file, decodes what it can, and prints by how many MB the process has grown at most.
_GROWTH = """
import sys
from fractions import Fraction
from pathlib import Path
from common.storage.blocks import BlockReader
from common.domain import PermanentJobError, SampleMode
from workers.media.containers import VideoFile, _deny
from workers.media.frames import to_rgb
from workers.media.sampling import Grid, Sampler
path, limit = sys.argv[1:]
content = Path(path).read_bytes()
def most():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])
before = most()
try:
    with BlockReader(lambda a, b: content[a:b], len(content), block_bytes=4096, cached_blocks=8, tries=1) as reader:
        video = VideoFile(reader, max_pixels=int(limit), threads=1)
        video.info()
        for sample in Sampler(video, Grid(Fraction(2)), SampleMode.FRAMES, 0, None):
            to_rgb(sample.frame)
except PermanentJobError as error:
    print(error.reason.value, file=sys.stderr)
print((most() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_claims_take_no_memory(tmp_path: Path) -> None:
    def growth(name: str, content: bytes, limit: int) -> int:
        path = tmp_path / name
        path.write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-c", _GROWTH, str(path), str(limit)], capture_output=True, text=True, check=True,
            cwd=ROOT,
        )  # fmt: skip
        return int(done.stdout)

    for name in ("both.avi", "both.mkv", "screen.gif", "wide.mp4"):
        assert growth(name, claims()[name], 1_000_000) < 60, name
    # The measure notices frames that are really large: 25 megapixels take 75 MB as RGB alone.
    real = make_video("avi", "mjpeg", 1, size=(5000, 5000), image=lambda _: np.zeros((5000, 5000, 3), np.uint8))
    assert growth("real.avi", real, 30_000_000) > 75


# --- files that point elsewhere ---


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[Canaries]:
    with watch_canaries(tmp_path) as canaries:
        yield canaries


def test_nothing_that_a_file_refers_to_is_opened(session: Session, bucket: Bucket, canaries: Canaries) -> None:
    playlists = {}
    for name, target in (("address", canaries.url), ("file", canaries.path), ("plain", f"file:{canaries.path}")):
        playlists |= {
            f"hls-{name}.mp4": hls(target),
            # Its first bytes pass for those of an MP4, which is then what it is taken for.
            f"masked-{name}.mp4": b"#---free\n" + hls(target),
            f"hls-{name}.ts": hls(target),
            f"ffconcat-{name}.mkv": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
            f"concat-{name}.avi": f"concat:{target}|{target}".encode(),
            f"name-{name}.gif": str(target).encode(),
            f"dash-{name}.webm": f'<?xml version="1.0"?><MPD><BaseURL>{target}</BaseURL></MPD>'.encode(),
        }
    for key, content in playlists.items():
        plan(session, bucket, key, content)
    alias = edited(video(), DREF, lambda _: alias_to(canaries.path))
    plan(session, bucket, "alias.mov", alias)
    plan(session, bucket, "url-file.mp4", edited(video(), DREF, lambda _: url_of(f"file://{canaries.path}")))
    plan(session, bucket, "url-address.mp4", edited(video(), DREF, lambda _: url_of(canaries.url)))
    plan(session, bucket, "good.mp4", video())
    work_off(session)
    check_whole(session, "good.mp4")
    for key in playlists:
        assert reason_of(session, key) == "unreadable_video", key
    # The frames of the first are elsewhere; FFmpeg knows no addresses here, and finds those of the others in the file.
    assert reason_of(session, "alias.mov") == "empty_video"
    check_whole(session, "url-file.mp4", "url-address.mp4")
    # FFmpeg doesn't ask to open that file; if it did, it would be refused.
    with pytest.raises(PermanentJobError, match="refers to another file"):
        av.open(
            io.BytesIO(alias),
            format="mp4",
            io_open=_deny,
            container_options={"enable_drefs": "1", "use_absolute_path": "1"},
        )
    assert canaries.hits == {"server": 0, "file": 0}
    # The control: the canaries notice when they are opened, and FFmpeg opens them when it is allowed to.
    playlist = canaries.path.with_name("playlist.m3u8")
    playlist.write_bytes(hls(canaries.url))
    assert open_freely(canaries, str(playlist))["server"] > 0
    playlist.write_bytes(hls(canaries.path))
    assert open_freely(canaries, str(playlist))["file"] > 0
    concat = f"ffconcat version 1.0\nfile '{canaries.path}'\n".encode()
    assert open_freely(canaries, io.BytesIO(concat))["file"] > 0
    assert open_freely(canaries, io.BytesIO(alias))["file"] > 0


# --- objects that change while they are read ---


@contextmanager
def at_frame(analyzer: FakeAnalyzer, number: int, event: Callable[[], None]) -> Iterator[None]:
    """What happens once, while this frame is analysed."""
    happened = threading.Event()

    def once() -> None:
        if not happened.is_set():
            happened.set()
            event()

    analyzer.while_analyzing[number] = once
    yield
    assert happened.is_set()


@pytest.fixture
def step_by_step(configure: Configure) -> None:
    """Nothing is decoded far ahead, so that what happens at a frame happens in the middle of the reading."""
    configure(worker__frame_buffer_bytes=1, worker__batch_frames=1, storage__cached_blocks=4)


@pytest.mark.usefixtures("step_by_step")
def test_an_object_that_vanishes_while_it_is_read(session: Session, bucket: Bucket, analyzer: FakeAnalyzer) -> None:
    put(session, bucket, gone__avi=large_video(), good__mp4=video())
    with at_frame(analyzer, 30, lambda: bucket.client.delete_object(Bucket=bucket.name, Key="gone.avi")):
        work_off(session)
    check_whole(session, "good.mp4")
    assert outcomes(session, "gone.avi") == [
        *WHOLE[:2],
        ("chunk", "quarantined", "object_gone"),
        ("chunk", "quarantined", "object_gone"),
    ]
    assert seen(session, "gone.avi") == [0, 5, 10, 15]


@pytest.mark.usefixtures("step_by_step")
def test_an_object_that_is_replaced_while_it_is_read(session: Session, bucket: Bucket, analyzer: FakeAnalyzer) -> None:
    put(session, bucket, new__avi=large_video(), good__mp4=video())
    shorter = make_video("avi", "mjpeg", 30, fps=RATE, image=lambda n: numbered(n + 100))
    with at_frame(analyzer, 30, lambda: bucket.put("new.avi", shorter)):
        refs = dispatch(session, limit=200)
        run_jobs(refs, worker="test/1", settings=get_settings())  # the probes
        run_jobs(dispatch(session, limit=200), worker="test/1", settings=get_settings())  # the chunks
    check_whole(session, "good.mp4")
    states = [(job.kind, job.state) for job in ended(session)["new.avi"]]
    # The first chunk had succeeded: its rows are withdrawn.
    assert states == [
        ("probe", "cancelled"),
        ("chunk", "cancelled"),
        ("chunk", "source_changed"),
        ("chunk", "cancelled"),
        ("probe", "pending"),
    ]
    assert seen(session, "new.avi") == []
    work_off(session)
    assert seen(session, "new.avi") == list(range(100, 130, EVERY))
    assert outcomes(session, "new.avi")[4:] == WHOLE[:3]


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("tries", [4, 1])
def test_an_outage_in_the_middle_of_a_chunk(
    services: Services,
    session: Session,
    bucket: Bucket,
    analyzer: FakeAnalyzer,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    tries: int,
) -> None:
    # botocore's own tries come first, and wait.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr("common.storage.blocks.RETRY_SECONDS", 0.01)
    faults: dict[str, int | list[int]] = {}
    with faulty_s3(services.endpoints.s3_endpoint_url, faults) as url:
        configure(storage__endpoint_url=url, storage__block_tries=tries, ledger__retry_base_seconds=1000)
        put(session, bucket, busy__avi=large_video(), good__mp4=video())

        def overload() -> None:
            # Two blocks may be on their way at a time, and botocore asks four times for each.
            faults["busy.avi"] = [0, *[503] * 8]

        with at_frame(analyzer, 5, overload):
            work_off(session)
    check_whole(session, "good.mp4")
    if tries > 1:
        assert faults["busy.avi"] == []
        check_whole(session, "busy.avi")
    else:
        assert outcomes(session, "busy.avi")[1] == ("chunk", "retry_wait", "storage_unavailable")
        # Of this chunk nothing is kept; what was left of the outage may have met the next one.
        assert seen(session, "busy.avi") in (ALL[4:], ALL[8:])


# --- whatever else ---


def test_an_analyser_that_fails_in_the_middle(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Configure
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a fault of ours")

    for sample in ("keyframes", "frames"):
        configure(pipeline__sample=sample, ledger__retry_base_seconds=1000)
        plan(session, bucket, f"{sample}.mp4", video())
        plan(session, bucket, f"{sample}.mkv", video("matroska", audio=True))
    analyzer.while_analyzing = {10: fail}
    work_off(session)
    for key, (_, first, *others) in ended(session).items():
        assert (first.state, first.reason) == ("retry_wait", "unexpected_error"), key
        assert first.detail is not None and "a fault of ours" in first.detail
        assert [job.state for job in others] == ["succeeded", "succeeded"], key
        assert seen(session, key) == ALL[4:]


KINDS = [
    ("mp4", "libx264"),
    ("mp4", "libx265"),
    ("matroska", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("avi", "mjpeg"),
    ("mpegts", "libx264"),
    ("gif", "gif"),
]


@pytest.mark.parametrize(("container", "codec"), KINDS)
@pytest.mark.parametrize("mode", list(SampleMode))
def test_damaged_bytes_are_no_more_than_a_reason(container: str, codec: str, mode: SampleMode) -> None:
    whole = make_video(container, codec, 30, fps=RATE, gop=5)
    random = np.random.default_rng(len(whole))
    for _ in range(12):
        damaged = bytearray(whole)
        for at in random.integers(0, len(damaged), random.integers(1, 30)):
            damaged[at] = random.integers(0, 256)
        if random.integers(0, 3) == 0:
            del damaged[random.integers(1, len(damaged)) :]
        _take_all(bytes(damaged), mode)


def _take_all(content: bytes, mode: SampleMode) -> None:
    from common.storage.blocks import BlockReader

    with BlockReader(
        lambda start, stop: content[start:stop], len(content), block_bytes=4096, cached_blocks=8, tries=1
    ) as reader:
        try:
            video = VideoFile(reader, max_pixels=1_000_000, threads=1)
            video.info()
            for first, stop in ((0, 2), (2, 4), (4, None)):
                for sample in Sampler(video, Grid(Fraction(2)), mode, first, stop):
                    to_rgb(sample.frame)
            video.close()
        except PermanentJobError as error:
            assert error.detail and "\n" not in error.detail
