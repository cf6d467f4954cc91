"""Examines the bytes of a video file before FFmpeg reads them: recognises the container, and finds damage that FFmpeg
would not report."""

from __future__ import annotations

import re
import struct
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

#: The first boxes of an MP4 or QuickTime file.
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
#: How many boxes at the top level of an MP4 are searched for its index.
_MAX_BOXES = 1000
#: Lengths of MPEG-TS packets: plain, with a time code (M2TS), with parity.
_TS_PACKETS = (188, 192, 204)
#: This many sync bytes in their places make an MPEG-TS.
_TS_SYNCS = 5
#: Places of an MPEG-TS whose clocks are compared, and how many bytes after each one are searched for a clock.
_TS_PLACES = 16
_TS_WINDOW_BYTES = 64 * 1024
#: The clock of an MPEG-TS begins anew after so many ticks (ISO/IEC 13818-1, section 2.4.3.5).
_TS_TICKS = 2**33

#: A JPEG with more passes (scans) than this was made to keep its reader busy: each pass goes over all pixels, however
#: few bytes it has. Encoders write about ten. (libtiff's limit is 100, too.)
MAX_JPEG_SCANS = 100
#: A marker of a JPEG, except those without a length (ITU-T T.81, section B.1.1.3).
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9


class Reader(Protocol):
    """A binary file, as `common.storage.blocks.BlockReader`. `error`: the error of reading, or None."""

    size: int
    error: Exception | None

    def read(self, count: int = -1) -> bytes: ...

    def seek(self, offset: int, whence: int = 0) -> int: ...

    def tell(self) -> int: ...


def recognise(head: bytes) -> str | None:
    """FFmpeg's name for the container that begins with these bytes (4 kB will do); None for any other content."""
    if head[4:8] in _MP4_BOXES:
        return "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    # Repetitive text may have a G, the sync byte, in the right places, but it has no NUL.
    return "mpegts" if 0 in head and _ts_layout(head) is not None else None


def has_too_many_scans(jpeg: bytes) -> bool:
    """Whether a JPEG has more than `MAX_JPEG_SCANS` passes over its pixels; bytes after its end don't count."""
    scans = position = 0
    while scans <= MAX_JPEG_SCANS:
        marker = _JPEG_MARKER.search(jpeg, position)
        if marker is None or marker[1][0] == _JPEG_END:
            return False
        scans += marker[1][0] == _JPEG_SCAN
        # Skip the marker's segment, which begins with its length and may hold any bytes, e.g. a thumbnail.
        length = jpeg[marker.end() : marker.end() + 2]
        position = marker.end() + max(2, int.from_bytes(length))
    return True


def _ts_layout(data: bytes) -> tuple[int, int] | None:
    """(length of a packet, offset of the first) of a piece of MPEG-TS; None for other data."""
    for length in _TS_PACKETS:
        for offset in range(length):
            syncs = data[offset::length][:_TS_SYNCS]
            if len(syncs) == _TS_SYNCS and set(syncs) == {0x47}:
                return length, offset
    return None


def _ts_clock(data: bytes, of: int | None) -> tuple[int, int] | None:
    """(packet id, ticks) of the first clock in a piece of MPEG-TS, or of the first with this id.

    That is the base of a program clock reference, in 1/90,000 s (ISO/IEC 13818-1, section 2.4.3.4).
    """
    layout = _ts_layout(data)
    if layout is None:
        return None
    length, offset = layout
    for start in range(offset, len(data) - 188, length):
        packet = data[start : start + 12]
        # Sync byte; the adaptation field exists, is long enough, and holds a clock.
        if packet[0] == 0x47 and packet[3] & 0x20 and packet[4] >= 7 and packet[5] & 0x10:
            found = int.from_bytes(packet[1:3]) & 0x1FFF
            if of in (None, found):
                return found, int.from_bytes(packet[6:11]) >> 7
    return None


def read_at(reader: Reader, start: int, count: int) -> bytes:
    """`count` bytes from `start` on, fewer at the end of the file."""
    reader.seek(start)
    data = b""
    while len(data) < count and (more := reader.read(count - len(data))):
        data += more
    return data


def has_index(reader: Reader) -> bool:
    """Whether an MP4 has its moov box, whole (ISO/IEC 14496-12, section 4.2: size, type, larger size)."""
    position = 0
    for _ in range(_MAX_BOXES):
        header = read_at(reader, position, 16)
        if len(header) < 8:
            return False
        size, kind = struct.unpack(">I4s", header[:8])
        if size == 1 and len(header) == 16:
            (size,) = struct.unpack(">Q", header[8:])
        elif size == 0:
            size = reader.size - position
        if kind == b"moov":
            return bool(position + size <= reader.size)
        if size < 8:
            return False
        position += size
    return False


def length_of_cut_avi(head: bytes, size: int) -> Fraction | None:
    """How long an AVI without its end was, in seconds, by its main header (RIFF size, microseconds per frame, frames);
    FFmpeg would report only the rest's length. None for a whole one. head: its first bytes; size: of the file."""
    if head[24:28] != b"avih" or len(head) < 52:
        return None
    (riff,) = struct.unpack("<I", head[4:8])
    if riff + 8 <= size:
        return None
    microseconds, frames = struct.unpack("<I12xI", head[32:52])
    return Fraction(microseconds * frames, 1_000_000) or None


def is_set_back(reader: Reader) -> bool:
    """Whether the clock of an MPEG-TS is set back somewhere, judged by its clocks at some places.

    Gaps are allowed, repeated times are not. A step back is missed if the clock has caught up again before the next
    place.
    """
    # FFmpeg reads the same file, so its position is restored.
    position = reader.tell()
    clocks, of = [], None
    for place in range(_TS_PLACES):
        found = _ts_clock(read_at(reader, reader.size * place // _TS_PLACES, _TS_WINDOW_BYTES), of)
        if found is not None:
            of, clock = found
            clocks.append(clock)
    reader.seek(position)
    # The clock wraps around: after the largest number of ticks comes 0.
    return any((later - clock) % _TS_TICKS > _TS_TICKS // 2 for clock, later in pairwise(clocks))
