"""Pictures of videos: the written MP4 is decoded again, and frames and stored faces are looked at where they are."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy.orm import Session

import workers.annotation.images
from common import ledger
from common.catalog import places
from common.domain import Face, Lane, MaskStatus, MaskwatchError, MediaKind, ObservedAt, ObservedAtSource, SampleMode
from common.planning import PlannedObject
from common.settings import get_settings
from common.storage.opening import open_bucket
from tests.ledger_rows import dispatch, rows
from tests.photos import jpeg, portrait
from tests.pipelines import default_spec
from tests.services import Bucket
from tests.videos import index_first, make_video, number_of
from workers.annotation.drawing import COLOURS
from workers.cli.annotate import annotate
from workers.jobs import models
from workers.jobs.run import run_jobs
from workers.media.frames import to_rgb

SIZE = (160, 120)
BOX = (40.0, 30.0, 80.0, 80.0)


def face(status: MaskStatus = MaskStatus.WITH_MASK, box: tuple[float, float, float, float] = BOX) -> Face:
    p_with = {MaskStatus.WITH_MASK: 0.9, MaskStatus.WITHOUT_MASK: 0.1, MaskStatus.UNCERTAIN: 0.5}[status]
    return Face(*box, 0.9, p_with, 1 - p_with, status)


@dataclass
class FakeAnalyzer:
    """Finds what it is told to find in its first, second, ... picture."""

    finds: Callable[[int], list[Face]] = lambda number: []
    seen: list[NDArray[np.uint8]] = field(default_factory=list)

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        self.seen.append(image_rgb)
        return self.finds(len(self.seen) - 1)

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        assert frames_rgb
        return [self.analyze(frame) for frame in frames_rgb]


@pytest.fixture
def analyzer(monkeypatch: pytest.MonkeyPatch) -> FakeAnalyzer:
    fake = FakeAnalyzer()
    monkeypatch.setattr(workers.annotation.images, "load_analyzer", lambda spec, runtime: fake)
    monkeypatch.setattr(models, "analyzer", lambda spec, runtime: fake)
    return fake


def run(*arguments: object) -> Result:
    return CliRunner().invoke(annotate, [str(argument) for argument in arguments])


def done(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception or result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(*arguments: object) -> str:
    """What the command says when it refuses."""
    result = run(*arguments)
    assert isinstance(result.exception, MaskwatchError), result.exception or result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@dataclass
class Decoded:
    """A written video, as a player sees it."""

    frames: list[NDArray[np.uint8]]
    times: list[Fraction]
    duration: Fraction
    stream: Any
    sounds: list[tuple[str, int, Fraction]]

    @classmethod
    def of(cls, path: Path) -> Decoded:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            found = list(file.decode(stream))
            assert all(frame.rotation == 0 for frame in found)
            sounds = []
            for number, sound in enumerate(file.streams.audio):
                file.seek(0)
                samples = sum(frame.samples for frame in file.decode(audio=number))
                sounds.append((sound.codec_context.codec.canonical_name, samples, sound.start_time * sound.time_base))
            return cls(
                [to_rgb(frame) for frame in found],
                [frame.pts * Fraction(frame.time_base) for frame in found],
                stream.duration * stream.time_base,
                stream.codec_context,
                sounds,
            )


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


# --- the same video ---

STEPS = [Fraction(step, 1000) for step in (40, 300, 700, 100, 520)] * 3
VARIABLE = [sum(STEPS[:n], Fraction(0)) for n in range(len(STEPS))]
STEADY = [Fraction(n, 10) for n in range(12)]


@pytest.mark.parametrize(
    ("name", "make", "times", "lasts"),
    [
        ("b-frames.mp4", lambda: make_video(frames=12, bframes=2, gop=5, size=SIZE), STEADY, Fraction(1, 10)),
        ("variable.mkv", lambda: make_video("matroska", times=VARIABLE, start=3, size=SIZE), VARIABLE, Fraction(1, 10)),
        ("variable.mp4", lambda: make_video(times=VARIABLE, size=SIZE), VARIABLE, Fraction(1, 10)),
        ("late.ts", lambda: make_video("mpegts", frames=12, start=5, bframes=2, size=SIZE), STEADY, Fraction(1, 10)),
        ("old.avi", lambda: make_video("avi", "mpeg4", frames=12, bframes=2, size=SIZE), STEADY, Fraction(1, 10)),
        ("loop.gif", lambda: make_video("gif", "gif", frames=12, size=SIZE), STEADY, Fraction(1, 10)),
        ("odd.webm", lambda: make_video("webm", "libvpx", frames=12, size=(161, 121)), STEADY, Fraction(1, 10)),
        ("one.mp4", lambda: make_video(frames=1, size=SIZE), STEADY[:1], Fraction(1, 10)),
    ],
)
def test_every_frame_is_written_at_its_time(
    analyzer: FakeAnalyzer, tmp_path: Path, name: str, make: Callable[[], bytes], times: list[Fraction], lasts: Fraction
) -> None:
    source = write(tmp_path / name, make())
    report = done(source, "--out", tmp_path / "out.mp4")
    written = Decoded.of(tmp_path / "out.mp4")
    assert [number_of(frame) for frame in written.frames] == list(range(len(times)))
    assert [float(at) for at in written.times] == pytest.approx([float(at) for at in times], abs=0.002)
    assert float(written.duration) == pytest.approx(float(times[-1] + lasts), abs=0.1)
    assert report["seconds"] == pytest.approx(float(written.duration), abs=0.001)
    assert report["frames"] == report["frames_analysed"] == len(times)
    assert report["cut_off_at_seconds"] is None
    assert (written.stream.name, written.stream.pix_fmt) == ("h264", "yuv420p")
    assert all(side % 2 == 0 for side in written.frames[0].shape[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.mp4"])
    assert [image.shape for image in analyzer.seen[:1]] == [((121, 161, 3) if "odd" in name else (120, 160, 3))]


def test_a_turned_video_is_upright(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    source = write(tmp_path / "turned.mov", make_video("mov", frames=3, rotation=90, size=SIZE))
    done(source, "--out", tmp_path / "out.mp4")
    written = Decoded.of(tmp_path / "out.mp4")
    assert [frame.shape for frame in written.frames] == [(160, 120, 3)] * 3
    assert [number_of(np.rot90(frame, -1)) for frame in written.frames] == [0, 1, 2]


@pytest.mark.parametrize("size", [SIZE, (1280, 720)])
def test_colours_stay(analyzer: FakeAnalyzer, tmp_path: Path, size: tuple[int, int]) -> None:
    colour = (200, 60, 90)
    image = np.full((size[1], size[0], 3), colour, np.uint8)
    source = write(tmp_path / "a.mp4", make_video(frames=1, size=size, image=lambda number: image))
    done(source, "--out", tmp_path / "out.mp4")
    written = Decoded.of(tmp_path / "out.mp4")
    assert (written.stream.colorspace, written.stream.color_range) == (1, 1)
    assert (written.stream.color_primaries, written.stream.color_trc) == (1, 1)
    # What was put into the encoder, whatever the source's own encoding did to it.
    assert np.abs(written.frames[0].astype(int) - analyzer.seen[0]).max() <= 6


def test_a_size_that_changes_in_the_middle_is_scaled_to_the_first(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    parts = [make_video("mpegts", frames=5, start=start, size=size) for start, size in ((5, SIZE), (6, (96, 64)))]
    source = write(tmp_path / "a.ts", b"".join(parts))
    done(source, "--out", tmp_path / "out.mp4")
    assert {image.shape for image in analyzer.seen} == {(120, 160, 3), (64, 96, 3)}
    written = Decoded.of(tmp_path / "out.mp4")
    assert [number_of(frame) for frame in written.frames] == [*range(5), *range(5)]
    assert {frame.shape for frame in written.frames} == {(120, 160, 3)}


# --- sound ---


@pytest.mark.parametrize(
    ("container", "codec", "sound"),
    [("mp4", "libx264", "aac"), ("matroska", "libx264", "opus"), ("mpegts", "libx264", "aac")],
)
def test_sound_is_kept(analyzer: FakeAnalyzer, tmp_path: Path, container: str, codec: str, sound: str) -> None:
    source = write(tmp_path / "source", make_video(container, codec, frames=20, size=SIZE, audio=True))
    report = done(source, "--out", tmp_path / "out.mp4")
    assert (report["sound"], report["sound_left_out"]) == ([sound], [])
    written = Decoded.of(tmp_path / "out.mp4")
    ((name, samples, start),) = written.sounds
    assert name == sound
    assert samples / 48000 == pytest.approx(2, abs=0.05)
    assert abs(start) < 0.05
    assert len(written.frames) == 20


def test_sound_keeps_its_distance_from_the_frames(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    # The picture begins half a second behind the sound.
    source = write(tmp_path / "a.mkv", make_video("matroska", frames=10, start=Fraction(1, 2), size=SIZE, audio=True))
    done(source, "--out", tmp_path / "out.mp4")
    written = Decoded.of(tmp_path / "out.mp4")
    ((_, samples, start),) = written.sounds
    assert written.times[0] == 0
    assert samples / 48000 + start == pytest.approx(0.5, abs=0.06)


def test_sound_that_an_mp4_can_not_hold_is_left_out_in_words(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.avi", make_video("avi", "mpeg4", frames=5, size=SIZE, audio=True))
    result = run(source, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.exception
    assert result.stderr.startswith("the sound (pcm_s16le) was left out: ")
    assert Decoded.of(tmp_path / "out.mp4").sounds == []


# --- boxes ---


def grey(number: int) -> NDArray[np.uint8]:
    return np.full((SIZE[1], SIZE[0], 3), 127, np.uint8)


def edge_colour(frame: NDArray[np.uint8]) -> NDArray[np.int_]:
    """The colour of the box's left and lower edge."""
    x1, _, x2, y2 = map(int, BOX)
    left, lower = frame[55:75, x1], frame[y2, x1 + 5 : x2 - 5]
    return np.asarray(np.concatenate([left, lower]).mean(axis=0), int)


def test_boxes_are_drawn_in_the_colour_of_their_faces(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    status = {0: MaskStatus.WITH_MASK, 1: MaskStatus.WITHOUT_MASK}
    analyzer.finds = lambda number: [face(status[number])] if number in status else []
    source = write(tmp_path / "a.mp4", make_video(frames=3, size=SIZE, image=grey))
    report = done(source, "--out", tmp_path / "out.mp4")
    assert report["faces"] == {"with_mask": 1, "without_mask": 1, "uncertain": 0}
    green, red, none = (edge_colour(frame) for frame in Decoded.of(tmp_path / "out.mp4").frames)
    assert green[1] - max(green[0], green[2]) > 30
    assert red[0] - max(red[1], red[2]) > 30
    assert np.abs(none - 127).max() < 8


def test_fewer_frames_are_analysed_and_their_boxes_stay(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    analyzer.finds = lambda number: [face()] if number == 1 else []
    source = write(tmp_path / "a.mp4", make_video(frames=12, size=SIZE, image=grey))
    report = done(source, "--out", tmp_path / "out.mp4", "--sample-fps", 2.5)
    assert (report["frames"], report["frames_analysed"]) == (12, 3)
    boxed = [np.ptp(edge_colour(frame)) > 30 for frame in Decoded.of(tmp_path / "out.mp4").frames]
    assert boxed == [False] * 4 + [True] * 4 + [False] * 4


# --- hidden faces ---


def textured(number: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    pattern = np.where((rows // 4 + columns // 4) % 2, 210, 40).astype(np.uint8)
    return np.repeat(pattern[:, :, None], 3, axis=2)


def test_hidden_faces_stay_hidden_for_a_moment_after_they_are_lost(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    analyzer.finds = lambda number: [face()] if number in (0, 1, 4) else []
    source = write(tmp_path / "a.mp4", make_video(frames=14, size=SIZE, image=textured))
    done(source, "--out", tmp_path / "out.mp4", "--blur")
    frames = [frame.astype(int) for frame in Decoded.of(tmp_path / "out.mp4").frames]
    before = [image.astype(int) for image in analyzer.seen]
    inside = (slice(50, 78), slice(44, 76))
    changed = [np.abs(after[inside] - was[inside]).mean() for after, was in zip(frames, before, strict=True)]
    assert all(change > 50 for change in changed[:10]), changed
    assert all(change < 12 for change in changed[10:]), changed
    far = (slice(0, 120), slice(110, 160))
    assert max(np.abs(after[far] - was[far]).mean() for after, was in zip(frames, before, strict=True)) < 12


def test_the_real_detector_finds_nobody_any_more(tmp_path: Path) -> None:
    photo = np.asarray(portrait())
    source = write(tmp_path / "a.mp4", make_video(frames=2, size=(256, 256), image=lambda number: photo))
    report = done(source, "--out", tmp_path / "out.mp4", "--blur")
    assert sum(report["faces"].values()) == 2
    again = done(tmp_path / "out.mp4", "--at", 0, "--out", tmp_path / "out.png")
    assert again["faces"] == []


# --- one frame ---


@pytest.mark.parametrize(
    ("at", "number"), [("0", 0), ("0.039", 0), ("00:00:00.34", 2), ("0:1.039", 2), ("1.04", 3), ("00:00:04.6", 14)]
)
def test_the_frame_that_is_shown_at_a_time(analyzer: FakeAnalyzer, tmp_path: Path, at: str, number: int) -> None:
    source = write(tmp_path / "a.mp4", make_video(times=VARIABLE, bframes=2, size=SIZE))
    report = done(source, "--at", at, "--out", tmp_path / "at.png")
    assert report["offset_seconds"] == pytest.approx(float(VARIABLE[number]))
    assert number_of(pixels(tmp_path / "at.png")) == number


def test_a_frame_that_is_shown_for_long_is_found_from_behind(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    times = [Fraction(at) for at in (0, 1, 2, 100, 101)]
    source = write(tmp_path / "a.mkv", make_video("matroska", times=times, gop=1, size=SIZE))
    assert done(source, "--at", "1:39.9", "--out", tmp_path / "at.png")["offset_seconds"] == 2


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_past_the_end_the_length_is_named(analyzer: FakeAnalyzer, tmp_path: Path, name: str) -> None:
    options = {"a.mp4": ("mp4", "libx264"), "a.gif": ("gif", "gif")}[name]
    source = write(tmp_path / name, make_video(*options, frames=25, size=SIZE))
    message = refused(source, "--at", "1:02:03", "--out", tmp_path / "at.png")
    assert message == f"nothing is shown at 01:02:03: file://{source} ends at 00:00:02.500"
    assert done(source, "--at", "2.499", "--out", tmp_path / "at.png")["offset_seconds"] == pytest.approx(2.4)


# --- damage ---


def cut_off(path: Path) -> Path:
    whole = index_first(make_video(frames=40, gop=5, size=SIZE))
    return write(path, whole[: len(whole) * 5 // 8])


def test_of_a_video_that_is_cut_off_the_rest_is_written(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    source = cut_off(tmp_path / "a.mp4")
    result = run(source, "--out", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.exception
    assert f"file://{source} is cut off: it was decoded and written up to 00:00:0" in result.stderr
    written = Decoded.of(tmp_path / "out.mp4")
    assert 5 < len(written.frames) < 35
    assert [number_of(frame) for frame in written.frames] == list(range(len(written.frames)))
    message = refused(source, "--at", 3.9, "--out", tmp_path / "at.png")
    assert message.startswith(f"nothing is shown at 00:00:03.900: file://{source} ends at 00:00:0")


def test_what_is_no_video_is_refused_by_its_name(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", b"#EXTM3U\n/etc/passwd\n" * 9)
    message = refused(source, "--out", tmp_path / "out.mp4")
    assert message.startswith(f"file://{source}: the content is not an MP4")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(143), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_what_was_there(analyzer: FakeAnalyzer, tmp_path: Path, error: BaseException) -> None:
    def finds(number: int) -> list[Face]:
        if number == 5:
            raise error
        return []

    analyzer.finds = finds
    source = write(tmp_path / "a.mp4", make_video(frames=10, size=SIZE))
    (tmp_path / "out.mp4").write_text("of an earlier run")
    assert run(source, "--out", tmp_path / "out.mp4").exit_code != 0
    assert (tmp_path / "out.mp4").read_text() == "of an earlier run"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", make_video(frames=10, size=SIZE))
    code = (
        "import os, signal, sys\nimport workers.annotation.images\nfrom workers.cli.annotate import annotate\n"
        "class Killed:\n    def analyze_batch(self, frames):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "workers.annotation.images.load_analyzer = lambda spec, runtime: Killed()\nannotate(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, str(source), "--out", str(tmp_path / "out.mp4")]
    assert subprocess.run(command, check=False, env=dict(os.environ), timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out.mp4").exists()


def test_an_output_that_can_not_be_written_is_named(analyzer: FakeAnalyzer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.mp4", make_video(frames=2, size=SIZE))
    write(tmp_path / "file", b"")
    message = refused(source, "--out", tmp_path / "file" / "out.mp4")
    assert message.startswith(f"can't make the folder {tmp_path / 'file'}: ")
    long = tmp_path / f"{'x' * 250}.mp4"
    assert refused(source, "--out", long).startswith(f"can't write {long}: ")


# --- stored faces ---


@pytest.fixture
def stored(analyzer: FakeAnalyzer, session: Session, bucket: Bucket) -> Callable[..., None]:
    """Analyses objects as a worker does, with the fake analyser: (key, content), ... → rows in `faces`."""

    def analyse(*objects: tuple[str, bytes], **spec: object) -> None:
        location = places.add_location(session, "lobby", "UTC")
        used = places.ensure_pipeline(session, default_spec(**spec))
        found = []
        for key, content in objects:
            bucket.put(key, content)
            kind = MediaKind.IMAGE if key.endswith(".jpg") else MediaKind.VIDEO
            seen = ObservedAt(datetime(2026, 3, 2, 12, tzinfo=UTC), ObservedAtSource.KEY_PATTERN)
            found.append(PlannedObject(open_bucket(bucket.uri).stat(key), kind, seen))
        ledger.register(session, found, location=location, camera=None, pipeline=used, lane=Lane.BACKFILL)
        session.commit()
        while refs := dispatch(session):
            assert run_jobs(refs, worker="test/1", settings=get_settings()) == len(refs)

    return analyse


def test_a_stored_face_of_a_video_is_shown_in_its_frame(
    stored: Callable[..., None], analyzer: FakeAnalyzer, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    small = (4.0, 4.0, 12.0, 14.0)
    analyzer.finds = lambda number: [face(), face(MaskStatus.WITHOUT_MASK, small)] if number == 2 else [face()]
    # B-frames, a variable rate, a rate of samples that lets the third be of frame 6.
    stored(("gate.mp4", make_video(times=VARIABLE, bframes=2, gop=4, size=SIZE)))
    found = rows(session, "SELECT id, offset_seconds, status FROM faces ORDER BY id")
    assert [row.offset_seconds for row in found] == pytest.approx([0, 1.04, 2, 2, 3.32, 4.02], abs=0.4)
    wanted = next(row for row in found if row.status == "without_mask")
    analyzed = len(analyzer.seen)

    report = done("--face", wanted.id, "--out", tmp_path / "face.png")
    assert len(analyzer.seen) == analyzed  # drawn as stored
    assert (report["source"], report["face_id"]) == (f"{bucket.uri}/gate.mp4", wanted.id)
    assert report["offset_seconds"] == wanted.offset_seconds
    assert [entry["status"] for entry in report["faces"]] == ["with_mask", "without_mask"]
    image = pixels(tmp_path / "face.png")
    plain = np.asarray(Image.fromarray(analyzer.seen[2]).resize((640, 480)))
    # Enlarged four times: the other's box has one line, the wanted one's three and a white rim.
    assert tuple(image[270, 160]) == COLOURS[MaskStatus.WITH_MASK]
    assert tuple(image[50, 16]) == tuple(image[50, 17]) == COLOURS[MaskStatus.WITHOUT_MASK]
    assert tuple(image[50, 13]) == (255, 255, 255)
    assert np.abs(image[100:, 400:].astype(int) - plain[100:, 400:]).mean() < 12


def test_a_keyframe_is_found_again_as_it_was_sampled(
    stored: Callable[..., None], analyzer: FakeAnalyzer, session: Session, tmp_path: Path
) -> None:
    analyzer.finds = lambda number: [face()]
    stored(
        ("gate.avi", make_video("avi", "mpeg4", frames=30, bframes=2, gop=7, size=SIZE)), sample=SampleMode.KEYFRAMES
    )
    for number, row in enumerate(rows(session, "SELECT id FROM faces ORDER BY id")):
        done("--face", row.id, "--out", tmp_path / "face.png")
        image = np.asarray(Image.fromarray(pixels(tmp_path / "face.png")).resize(SIZE), int)[:, 100:]
        assert np.abs(image - analyzer.seen[number][:, 100:]).mean() < 12


def test_a_stored_face_of_an_image_and_what_keeps_it_from_being_shown(
    stored: Callable[..., None], analyzer: FakeAnalyzer, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    analyzer.finds = lambda number: [face()]
    photo = portrait().resize(SIZE)
    stored(("a.jpg", jpeg(photo)))
    ((face_id,),) = rows(session, "SELECT id FROM faces")
    result = run("--face", face_id, "--out", tmp_path / "face.png")
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"{tmp_path / 'face.png'}: face {face_id}, with_mask, and 0 others of {bucket.uri}/a.jpg\n"
    assert pixels(tmp_path / "face.png").shape == (480, 640, 3)
    done("--face", face_id, "--out", tmp_path / "hidden.png", "--blur")
    shown, hidden = (pixels(tmp_path / name).astype(int) for name in ("face.png", "hidden.png"))
    assert np.abs(shown - hidden)[180:300, 190:300].mean() > 15
    assert (shown[:, 480:] == hidden[:, 480:]).all()

    assert refused("--face", 99, "--out", tmp_path / "x.png").startswith("there is no face 99; ")
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=30)
    bucket.put("a.jpg", buffer.getvalue())
    assert "has changed since face" in refused("--face", face_id, "--out", tmp_path / "x.png")
    bucket.client.delete_object(Bucket=bucket.name, Key="a.jpg")
    message = refused("--face", face_id, "--out", tmp_path / "x.png")
    assert message == f"face {face_id} can't be shown: {bucket.uri}/a.jpg is gone"
    assert not (tmp_path / "x.png").exists()


def test_a_video_in_a_bucket_is_annotated(analyzer: FakeAnalyzer, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("2026/gate.mp4", make_video(frames=5, size=SIZE))
    bucket.put("2026/gate.mp4.txt", b"a note")
    report = done(f"{bucket.uri}/2026/gate.mp4", "--out", tmp_path / "out.mp4")
    assert report["source"] == f"{bucket.uri}/2026/gate.mp4"
    assert len(Decoded.of(tmp_path / "out.mp4").frames) == 5
    assert "is gone" not in refused(f"{bucket.uri}/nothing", "--out", tmp_path / "x.mp4")
