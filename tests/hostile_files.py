"""Hostile files, made by the tests: headers that claim impossible sizes, and references to other files or addresses.

And canaries: a server and a named pipe that count how often they are opened.
"""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
from PIL import Image

from tests.photos import jpeg
from tests.videos import make_video

#: Each video of `video` has this many frames, so many a second.
FRAMES, RATE = 60, 10


@lru_cache(maxsize=32)
def video(container: str = "mp4", codec: str = "libx264", **options: Any) -> bytes:
    return make_video(container, codec, FRAMES, fps=RATE, gop=5, **options)


def atoms(content: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, body) of the boxes of an MP4 at one level."""
    found, position = [], 0
    while position < len(content):
        size, kind = struct.unpack(">I4s", content[position : position + 8])
        found.append((kind, content[position + 8 : position + size]))
        position += size
    return found


def edited(content: bytes, path: Sequence[bytes], edit: Callable[[bytes], bytes]) -> bytes:
    """An MP4 whose boxes at this path have another body. Its index must come last, or no size may change."""
    if not path:
        return edit(content)
    parts = [(kind, edited(body, path[1:], edit) if kind == path[0] else body) for kind, body in atoms(content)]
    return b"".join(struct.pack(">I4s", len(body) + 8, kind) + body for kind, body in parts)


STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
DREF = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")


def claiming(content: bytes, was: bytes, claim: bytes) -> bytes:
    assert was in content
    return content.replace(was, claim)


def sof(width: int, height: int) -> bytes:
    """The beginning of a JPEG's frame header: 8 bits, height, width."""
    return b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", height, width)


def sps(width: int, height: int) -> bytes:
    """The parameter set of an H.264 stream (ITU-T H.264, section 7.3.2.1.1), baseline, of frames of this size."""

    def golomb(value: int) -> str:
        digits = f"{value + 1:b}"
        return "0" * (len(digits) - 1) + digits

    # Its id, numbering, order, reference frames; whole frames; nothing cropped, nothing else told.
    bits = golomb(0) + golomb(0) + golomb(2) + golomb(1) + "0"
    bits += golomb(width // 16 - 1) + golomb(height // 16 - 1) + "11" + "0" + "0" + "1"
    bits += "0" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8)
    assert b"\0\0" not in body  # which would have to be escaped
    return b"\x67\x42\x00\x33" + body


def with_sps(mp4: bytes, new: bytes) -> bytes:
    """An MP4 of H.264 with another parameter set."""

    def edit(stsd: bytes) -> bytes:
        at = stsd.index(b"avcC") - 4
        ((_, config),) = atoms(stsd[at : at + struct.unpack(">I", stsd[at : at + 4])[0]])
        (length,) = struct.unpack(">H", config[6:8])
        config = config[:6] + struct.pack(">H", len(new)) + new + config[8 + length :]
        ((kind, entry),) = atoms(stsd[8:])
        entry = entry[:78] + struct.pack(">I4s", len(config) + 8, b"avcC") + config
        return stsd[:8] + struct.pack(">I4s", len(entry) + 8, kind) + entry

    return edited(mp4, (*STBL, b"stsd"), edit)


def claims() -> dict[str, bytes]:
    """Small files whose headers claim enormous frames."""
    avi, gif, mp4 = video("avi", "mjpeg"), video("gif", "gif"), video("mp4", "mjpeg")
    mkv = make_video("matroska", "mjpeg", 20, size=(320, 240))
    huge, small, large = (100_000, 100_000), (64, 48), (65_500, 65_500)
    stsd = bytes(16) + struct.pack(">HH", *small)
    return {
        "header.avi": claiming(avi, struct.pack("<II", *small), struct.pack("<II", *huge)),
        "frames.avi": claiming(avi, sof(*small), sof(*large)),
        "both.avi": claiming(
            claiming(avi, struct.pack("<II", *small), struct.pack("<II", *huge)), sof(*small), sof(*large)
        ),
        "screen.gif": claiming(gif, b"GIF89a" + struct.pack("<HH", *small), b"GIF89a" + struct.pack("<HH", *large)),
        "track.mp4": claiming(mp4, stsd, bytes(16) + struct.pack(">HH", *large)),
        "both.mp4": claiming(
            claiming(mp4, stsd, bytes(16) + struct.pack(">HH", *large)), sof(*small), sof(*large)
        ),
        "stream.mp4": with_sps(video(), sps(100_000, 100_000)),
        "wide.mp4": with_sps(video(), sps(16_000, 8_000)),
        "track.mkv": claiming(
            mkv, b"\xb0\x82\x01\x40\xba\x81\xf0", b"\xb0\x82\xff\xfe\xba\x81\xf0"
        ),
        "both.mkv": claiming(
            claiming(mkv, b"\xb0\x82\x01\x40\xba\x81\xf0", b"\xb0\x82\xff\xfe\xba\x81\xf0"),
            sof(320, 240),
            sof(*large),
        ),
    }  # fmt: skip


def scan_bomb(scans: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A JPEG of so many passes over its pixels, all but the first few of a few bytes and without any effect."""
    whole = jpeg(Image.new("L", size), progressive=True)
    last, end = whole.rfind(b"\xff\xda"), whole.rfind(b"\xff\xd9")
    return whole[:end] + whole[last:end] * (scans - whole.count(b"\xff\xda")) + whole[end:]


def mjpeg(*images: bytes, size: tuple[int, int] = (64, 48)) -> bytes:
    """An AVI of these JPEGs as they are, one a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as file:
        stream = file.add_stream("mjpeg", rate=1)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p"
        for number, image in enumerate(images):
            packet = av.Packet(image)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1), stream, True
            file.mux(packet)
    return buffer.getvalue()


# --- files that point elsewhere ---


@dataclass
class Canaries:
    """A server and a file that nobody should open. hits: how often somebody did, by "server" and "file"."""

    url: str
    path: Path
    hits: dict[str, int]


@contextmanager
def watch_canaries(folder: Path) -> Iterator[Canaries]:
    """Canaries that are watched until the end of the block; the file lies in `folder`."""
    hits = {"server": 0, "file": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits["server"] += 1
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    # A named pipe: a program that opens it for reading, in any language, unblocks our thread that opens it for writing.
    path = folder / "canary.ts"
    os.mkfifo(path)
    stopping = threading.Event()

    def watch() -> None:
        while True:
            with path.open("wb"):
                if stopping.is_set():
                    return
                hits["file"] += 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    try:
        yield Canaries(f"http://127.0.0.1:{server.server_address[1]}/canary.ts", path, hits)
    finally:
        server.shutdown()
        server.server_close()
        stopping.set()
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        for thread in threads:
            thread.join(10)


def alias_to(path: Path) -> bytes:
    """The body of a dref box whose one entry is a Macintosh alias of an absolute path (Inside Macintosh: Files)."""
    text = str(path).encode()
    record = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + struct.pack(">HH", 0, 0) + bytes(16)
    record += struct.pack(">HH", 2, len(text)) + text + bytes(len(text) % 2) + struct.pack(">hH", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    return struct.pack(">II", 0, 1) + entry


def url_of(url: str) -> bytes:
    """The body of a dref box whose one entry is an address (ISO/IEC 14496-12, section 8.7.2)."""
    entry = struct.pack(">I4sI", 12 + len(url) + 1, b"url ", 0) + url.encode() + b"\0"
    return struct.pack(">II", 0, 1) + entry


def hls(target: object) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n".encode()


def open_freely(canaries: Canaries, source: Any) -> dict[str, int]:
    """How often a lax reader of a file or path hits the canaries: FFmpeg, with all that it offers allowed."""
    before = dict(canaries.hits)
    everything = {"protocol_whitelist": "file,http,tcp,crypto,data,concat,subfile", "allowed_extensions": "ALL"}
    lax = {"safe": "0", "enable_drefs": "1", "use_absolute_path": "1", "extension_picky": "0"}
    try:
        with av.open(source, container_options={**everything, **lax}) as file:
            next(file.demux(), None)
    except (av.FFmpegError, StopIteration, ValueError):
        pass
    return {name: canaries.hits[name] - before[name] for name in before}
