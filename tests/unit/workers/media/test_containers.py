"""What is a video, what is read of it to learn what it is, and what its header says."""

from __future__ import annotations

import io
import struct
import zipfile
from datetime import UTC, datetime
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from common.domain import PermanentJobError, Reason, TransientJobError
from common.storage.blocks import BlockReader
from tests.videos import index_first, make_video, number_of
from workers.media.containers import VideoFile
from workers.media.frames import to_rgb
from workers.media.sniffing import recognise

MAX_PIXELS = 1000 * 1000
MADE = {"creation_time": "2026-03-02T12:00:00.000000Z"}
NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

#: Container, encoder, options, FFmpeg's name of the demuxer, canonical name of the codec.
KINDS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "mp4": ("mp4", "libx264", {}, "mp4", "h264"),
    "mp4 with sound": ("mp4", "libx264", {"audio": True}, "mp4", "h264"),
    "mp4 in fragments": ("mp4", "libx264", {"muxer": FRAGMENTED}, "mp4", "h264"),
    "mp4 with B-frames": ("mp4", "libx264", {"bframes": 2}, "mp4", "h264"),
    "mp4, hevc": ("mp4", "libx265", {}, "mp4", "hevc"),
    "mp4, av1": ("mp4", "libsvtav1", {}, "mp4", "av1"),
    "mov": ("mov", "libx264", {}, "mp4", "h264"),
    "mov, mjpeg": ("mov", "mjpeg", {}, "mp4", "mjpeg"),
    "mkv": ("matroska", "libx264", {}, "matroska", "h264"),
    "webm, vp9": ("webm", "libvpx-vp9", {"audio": True}, "matroska", "vp9"),
    "webm, vp8": ("webm", "libvpx", {}, "matroska", "vp8"),
    "avi, mjpeg": ("avi", "mjpeg", {}, "avi", "mjpeg"),
    "avi, mpeg4": ("avi", "mpeg4", {"audio": True}, "avi", "mpeg4"),
    "ts": ("mpegts", "libx264", {}, "mpegts", "h264"),
    "ts, mpeg2": ("mpegts", "mpeg2video", {"fps": 25}, "mpegts", "mpeg2video"),
    "gif": ("gif", "gif", {}, "gif", "gif"),
}
#: Containers that keep the time of the recording as `make_video` writes it.
DATED = ("mp4", "mov", "mkv", "webm")


@lru_cache(maxsize=64)
def video(kind: str, frames: int = 20) -> bytes:
    container, codec, options, _, _ = KINDS[kind]
    return make_video(container, codec, frames, metadata=MADE, **options)


def opened(content: bytes, *, max_pixels: int = MAX_PIXELS) -> VideoFile:
    return VideoFile(blocks(content), max_pixels=max_pixels, threads=1)


def blocks(content: bytes, block_bytes: int = 4096) -> BlockReader:
    return BlockReader(
        lambda start, stop: content[start:stop], len(content), block_bytes=block_bytes, cached_blocks=64, tries=1
    )


# --- recognition ---


@pytest.mark.parametrize("kind", KINDS)
def test_containers_are_recognised_by_their_head(kind: str) -> None:
    content = video(kind)
    assert recognise(content[:4096]) == KINDS[kind][3]
    if KINDS[kind][3:] == ("mp4", "h264"):
        assert recognise(index_first(content)[:4096]) == "mp4"


def test_ts_of_cameras_and_of_broadcasts() -> None:
    plain = video("ts")
    packets = [plain[at : at + 188] for at in range(0, len(plain), 188)]
    assert recognise(b"".join(b"\0\0\0\0" + packet for packet in packets)[:4096]) == "mpegts"
    assert recognise(b"".join(packet + bytes(16) for packet in packets)[:4096]) == "mpegts"
    assert recognise(plain[100:4096]) == "mpegts"  # cut off in front


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("video.mp4", video("mp4"))
    return buffer.getvalue()


def _image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (10, 90, 200)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0" * 5000, id="zeros"),
        pytest.param(b"The camera was off today.\n" * 300, id="text"),
        pytest.param(b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:10,\nhttp://127.0.0.1/a.ts\n", id="HLS playlist"),
        pytest.param(b"#EXTM3U\r\nvideo.mp4\r\n", id="m3u"),
        pytest.param(b"ffconcat version 1.0\nfile /etc/hostname\n", id="ffconcat"),
        pytest.param(b"concat:/etc/hostname|/etc/hostname", id="concat"),
        pytest.param(b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n", id="SDP"),
        pytest.param(b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', id="DASH"),
        pytest.param(b"<!doctype html><title>404</title>" + b"<p>Gone</p>\n" * 800, id="HTML"),
        pytest.param(_image("JPEG"), id="JPEG"),
        pytest.param(_image("PNG"), id="PNG"),
        pytest.param(b"RIFF\x24\x08\0\0WAVEfmt " + bytes(2000), id="WAV"),
        pytest.param(b"RIFF\x24\x08\0\0WEBPVP8 " + bytes(2000), id="WebP"),
        pytest.param(b"OggS\0\x02" + bytes(2000), id="Ogg"),
        pytest.param(b"FLV\x01\x05\0\0\0\x09" + bytes(2000), id="FLV"),
        pytest.param(b"ID3\x04" + bytes(2000), id="MP3"),
        pytest.param(b"\0\0\0\x01\x67\x42\xc0\x1e" + bytes(2000), id="bare H.264"),
        pytest.param(b"YUV4MPEG2 W64 H48 F10:1\nFRAME\n" + bytes(4608), id="bare pixels"),
    ],
)
def test_other_content_is_no_video(content: bytes) -> None:
    assert recognise(content[:4096]) is None
    with pytest.raises(PermanentJobError) as caught:
        opened(content)
    assert caught.value.reason is (Reason.UNREADABLE_VIDEO if content else Reason.EMPTY_FILE)


def test_a_zip_of_a_video_is_none() -> None:
    assert recognise(_zip()[:4096]) is None


@given(st.binary(max_size=600))
def test_any_head_is_looked_at(head: bytes) -> None:
    assert recognise(head) in {None, "mp4", "matroska", "avi", "gif", "mpegts"}


# --- codecs ---


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("matroska", "ffv1", {}),
        ("matroska", "mpeg1video", {"fps": 25}),
        ("mov", "prores", {"pixels": "yuv422p10le"}),
        ("avi", "rawvideo", {}),
    ],
)
def test_only_the_listed_codecs_are_decoded(container: str, codec: str, options: dict[str, Any]) -> None:
    content = make_video(container, codec, 5, **options)
    # FFmpeg itself could.
    with av.open(io.BytesIO(content)) as file:
        assert number_of(to_rgb(next(file.decode(video=0)))) == 0
    with pytest.raises(PermanentJobError, match=codec) as caught:
        opened(content)
    assert caught.value.reason is Reason.UNSUPPORTED_CODEC
    assert "H.264" in caught.value.detail


# --- the header ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_is_read(kind: str) -> None:
    _, _, options, name, codec = KINDS[kind]
    rate = options.get("fps", 10)
    file = opened(video(kind))
    info = file.info()
    assert (info.container, info.codec) == (name, codec)
    assert (info.width, info.height, info.rotation) == (64, 48, 0)
    # TS has no lengths, so that the last frame is of unknown length; fragments tell theirs as they come.
    assert info.duration_seconds == pytest.approx(20 / rate, abs=0.11)
    assert info.frame_rate == pytest.approx(rate)
    assert info.created_at == (NOON if kind.startswith(DATED) else None)
    # The look at the first frame spoils nothing.
    file.restart()
    frames = [to_rgb(frame) for packet in file.packets() for frame in packet.decode()]
    frames += [to_rgb(frame) for frame in file.stream.codec_context.decode(None)]
    assert [number_of(frame) for frame in frames] == list(range(20))
    file.close()


def test_the_index_may_come_first() -> None:
    content = index_first(video("mp4"))
    assert content.index(b"moov") < content.index(b"mdat")
    assert video("mp4").index(b"moov") > video("mp4").index(b"mdat")
    first, last = opened(content).info(), opened(video("mp4")).info()
    assert first.duration_seconds == last.duration_seconds == 2
    assert first.frame_rate == last.frame_rate == 10


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("turned", [90, 180, 270])
def test_rotation(container: str, turned: int) -> None:
    info = opened(make_video(container, "libx264", 3, rotation=turned)).info()
    assert (info.rotation, info.width, info.height) == (turned, 64, 48)


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(25, 2), Fraction(1, 2)])
def test_odd_rates(rate: Fraction) -> None:
    info = opened(make_video("mp4", "libx264", 5, fps=rate)).info()
    assert info.frame_rate == pytest.approx(float(rate))
    assert info.duration_seconds == pytest.approx(float(5 / rate), abs=0.01)


def test_a_late_start_is_taken_off() -> None:
    file = opened(make_video("mpegts", "libx264", 10, start=100))
    assert file.info().duration_seconds == pytest.approx(1, abs=0.11)
    file.restart()
    assert [file.shown(packet) for packet in file.packets()] == [Fraction(n, 10) for n in range(10)]


def test_a_cover_image_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=48000, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8)).reformat(format="yuvj420p")
        frame.pts = 0
        file.mux(cover.encode(frame))
        file.mux(cover.encode(None))
        for start in range(0, 4096, 1024):
            part = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            part.planes[0].update(bytes(part.planes[0].buffer_size))
            part.sample_rate, part.pts, part.time_base = 48000, start, Fraction(1, 48000)
            file.mux(sound.encode(part))
        file.mux(sound.encode(None))
    with av.open(io.BytesIO(buffer.getvalue())) as written:
        assert len(written.streams.video) == 1
    with pytest.raises(PermanentJobError) as caught:
        opened(buffer.getvalue())
    assert caught.value.reason is Reason.NO_VIDEO_STREAM


def test_a_frame_larger_than_the_limit() -> None:
    content = video("mp4")
    opened(content, max_pixels=64 * 48).close()
    with pytest.raises(PermanentJobError, match="64 × 48") as caught:
        opened(content, max_pixels=64 * 48 - 1)
    assert caught.value.reason is Reason.FRAME_TOO_LARGE


# --- an index that isn't there ---


def boxes(content: bytes) -> list[tuple[str, int, int]]:
    """(kind, start, size) of the boxes at the top of an MP4."""
    found, position = [], 0
    while position < len(content):
        size, kind = struct.unpack(">I4s", content[position : position + 8])
        found.append((kind.decode(), position, size))
        position += size
    return found


@pytest.mark.parametrize("left", [0.0, 0.3, 0.6])
def test_an_mp4_without_its_whole_index_says_so(left: float) -> None:
    content = video("mp4")
    ((start, size),) = [(start, size) for kind, start, size in boxes(content) if kind == "moov"]
    with pytest.raises(PermanentJobError, match="index") as caught:
        opened(content[: start + int(left * size)])
    assert caught.value.reason is Reason.UNREADABLE_VIDEO


def test_an_mp4_that_is_damaged_otherwise_blames_no_index() -> None:
    content = bytearray(video("mp4"))
    start = bytes(content).index(b"stsd")
    content[start : start + 4] = b"xxxx"
    with pytest.raises(PermanentJobError) as caught:
        opened(bytes(content))
    assert "moov" not in caught.value.detail


# --- lengths and clocks that FFmpeg gets wrong ---


@pytest.mark.parametrize("left", [0.9, 0.8, 0.7])
def test_a_cut_avi_is_as_long_as_it_was(left: float) -> None:
    content = video("avi, mjpeg", 60)
    cut = content[: int(left * len(content))]
    with av.open(io.BytesIO(cut)) as file:
        assert sum(1 for packet in file.demux(video=0) if packet.size) < 60
    assert opened(cut).info().duration_seconds == opened(cut).end == 6


def test_an_avi_that_was_never_finished_tells_no_length() -> None:
    # A recorder that loses power leaves the sizes and counts as they were in the beginning.
    content = bytearray(video("avi, mjpeg"))
    content[4:8], content[48:52] = b"\xff\xff\xff\xff", bytes(4)
    file = opened(bytes(content))
    info = file.info()
    assert info.duration_seconds is None or info.duration_seconds == pytest.approx(2, abs=0.5)
    file.restart()
    assert len(list(file.packets())) == 20


def ts(start: Fraction | float, frames: int = 20) -> bytes:
    return make_video("mpegts", frames=frames, start=start)


def with_time_codes(content: bytes) -> bytes:
    """As cameras write it (M2TS): four bytes before each packet."""
    return b"".join(b"\0\0\0\0" + content[at : at + 188] for at in range(0, len(content), 188))


#: Where the clock of an MPEG-TS begins anew.
TURN = 2**33 / 90000


@pytest.mark.parametrize("pack", [bytes, with_time_codes])
@pytest.mark.parametrize("second", [0, 50, 99, 101.5])
def test_a_clock_that_is_set_back_is_noticed(pack: Any, second: float) -> None:
    with pytest.raises(PermanentJobError, match="clock is set back") as caught:
        opened(pack(ts(100) + ts(second))).info()
    assert caught.value.reason is Reason.BROKEN_TIMESTAMPS


@pytest.mark.parametrize("pack", [bytes, with_time_codes])
@pytest.mark.parametrize(("first", "second"), [(100, 102), (100, 1000), (TURN - 2, 0), (TURN - 1, 2)])
def test_a_clock_that_goes_on_is_none_that_is_set_back(pack: Any, first: float, second: float) -> None:
    assert opened(pack(ts(first) + ts(second))).info().duration_seconds is not None
    # Nor is one that turns over in the middle of a recording.
    assert opened(pack(ts(TURN - 1))).info().duration_seconds == pytest.approx(2, abs=0.11)


# --- what is read ---


def noise(number: int) -> NDArray[np.uint8]:
    """Frames that can't be compressed, so that files are large and quickly made."""
    still = np.random.default_rng(7).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    return np.roll(still, (number * 37, number * 53), (0, 1))


@lru_cache(maxsize=1)
def large_mp4() -> bytes:
    return make_video("mp4", "libx264", 80, size=(320, 240), image=noise, options={"qp": "30"}, audio=True)


@pytest.mark.parametrize("kind", ["mp4", "mp4, index first", "mkv", "avi", "ts"])
def test_a_probe_reads_a_small_part(kind: str) -> None:
    if kind == "avi":
        content = make_video("avi", "mjpeg", 300, size=(320, 240), image=noise)
    elif kind == "ts":
        content = make_video("mpegts", "libx264", 300, size=(320, 240), image=noise, options={"qp": "30"})
    elif kind == "mkv":
        content = make_video("matroska", "libx264", 80, size=(320, 240), image=noise, options={"qp": "30"})
    else:
        content = large_mp4() if kind == "mp4" else index_first(large_mp4())
    assert len(content) > 3_000_000
    with blocks(content, 64 * 1024) as reader:
        file = VideoFile(reader, max_pixels=MAX_PIXELS, threads=1)
        info = file.info()
        # An MPEG-TS has no header: its beginning, its end and some clocks are read.
        assert reader.fetched_bytes < len(content) / (2 if kind == "ts" else 5)
        file.close()
    assert info.duration_seconds == pytest.approx(30 if kind in ("avi", "ts") else 8, abs=0.01)


def test_one_that_is_sought_in_reads_a_small_part() -> None:
    content = large_mp4()
    with blocks(content, 64 * 1024) as reader:
        file = VideoFile(reader, max_pixels=MAX_PIXELS, threads=1)
        assert file.seek(Fraction(6))
        packet = next(packet for packet in file.packets() if packet.is_keyframe)
        shown = file.shown(packet)
        assert shown is not None and 4.5 < shown <= 6  # a keyframe each 1.2 s
        assert reader.fetched_bytes < len(content) / 5
        file.close()


# --- errors of reading ---


@pytest.mark.parametrize("kind", ["mp4", "mp4 in fragments", "mkv", "webm, vp9", "avi, mjpeg", "ts", "gif"])
def test_what_reading_raises_comes_through(kind: str) -> None:
    content = video(kind, 60)
    block_bytes = max(1, len(content) // 25)
    raised = 0
    for bad in range(-(-len(content) // block_bytes)):

        def fetch(start: int, stop: int, bad: int = bad) -> bytes:
            if start // block_bytes == bad:
                raise TransientJobError(Reason.STORAGE_UNAVAILABLE, "the line is cut")
            return content[start:stop]

        with BlockReader(fetch, len(content), block_bytes=block_bytes, cached_blocks=4, tries=1) as reader:
            try:
                file = VideoFile(reader, max_pixels=MAX_PIXELS, threads=1)
                file.info()
                file.restart()
                packets = len(list(file.packets()))
            except TransientJobError:
                raised += 1
            else:
                # Nothing of it was needed.
                assert reader.error is None and packets == 60
    assert raised >= 15
