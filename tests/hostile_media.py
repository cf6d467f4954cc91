"""Some hundred hostile pictures and videos, each made on the spot and known by the key it is put under.

Of each the decoders are to say no, or to give what is in it: without opening another file or address, without dying,
and within bounds of memory and time.
"""

from __future__ import annotations

import gzip
import io
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import av
from PIL import Image

from tests.hostile_files import DREF, Canaries, alias_to, claims, edited, hls, mjpeg, scan_bomb, url_of, video
from tests.photos import jpeg, portrait
from tests.videos import index_first, make_video

#: What a key may be in S3, and what a shell, a database, a browser, a path or a terminal could make of it.
KEYS = (
    "../../../etc/passwd.jpg",
    "a/../../b.jpg",
    "/begins-with-a-slash.jpg",
    "//two-slashes//.jpg",
    'it\'s "quoted".jpg',
    "$(touch canary).jpg",
    "`touch canary`.jpg",
    "; rm -rf ~ #.jpg",
    "-rf.jpg",
    "<script>alert(1)</script>.jpg",
    "&amp;<img src=x onerror=alert(1)>.jpg",
    "%00.jpg",
    "%2e%2e%2f%2e%2e%2fpasswd.jpg",
    "%s%n%(key)s{key}{{7*7}}.jpg",
    "x'); DROP TABLE jobs; --.jpg",
    "\u202egpj.exe.jpg",
    "e\u0301\U0001f600.jpg",
    "\x07\x1b[2J\x1b]0;bell\x07.jpg",
    "tab\tand return\r.jpg",
    "back\\slash\\C:\\x.jpg",
    "=cmd|' /C calc'!A0.jpg",
    "a?b=c#d&e +f.jpg",
    " .jpg",
    "l" * 1000 + ".jpg",
)


def good(number: int) -> bytes:
    """A picture of one face; other bytes for other numbers."""
    return jpeg(portrait(128), comment=f"good {number}".encode())


@lru_cache
def images() -> dict[str, bytes]:
    """One good picture in each format, by the suffix of its key, with what comes before the dot to tell them apart."""
    photo = portrait(128)

    def saved(kind: str, image: Image.Image = photo, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return {
        "baseline.jpg": saved("JPEG"),
        "progressive.jpg": saved("JPEG", progressive=True),
        "phone.jpg": saved("MPO", save_all=True, append_images=[photo]),
        "plain.png": saved("PNG"),
        "palette.png": saved("PNG", photo.quantize(16)),
        "lossy.webp": saved("WEBP"),
        "lossless.webp": saved("WEBP", lossless=True),
        "plain.bmp": saved("BMP"),
        "raw.tif": saved("TIFF"),
        "lzw.tif": saved("TIFF", compression="tiff_lzw"),
        "deflate.tif": saved("TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": saved("TIFF", compression="jpeg"),
    }


@lru_cache
def videos() -> dict[str, bytes]:
    """One good video in each container and codec."""
    return {
        "h264.mp4": video(),
        "index-first.mp4": index_first(video()),
        "hevc.mp4": video("mp4", "libx265"),
        "h264.mov": video("mov"),
        "mpeg4.avi": video("avi", "mpeg4"),
        "mjpeg.avi": video("avi", "mjpeg"),
        "h264.mkv": video("matroska", bframes=2),
        "vp9.webm": video("webm", "libvpx-vp9"),
        "vp8.webm": video("webm", "libvpx"),
        "av1.mkv": video("matroska", "libsvtav1"),
        "h264.ts": video("mpegts"),
        "mpeg2.ts": video("mpegts", "mpeg2video"),
        "colours.gif": video("gif", "gif"),
    }


def damaged(chance: random.Random, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """Every format cut off `cuts` times, and with some of its bits turned `flips` times."""
    for name, whole in {**images(), **videos()}.items():
        for number in range(cuts):
            yield f"cut/{number}-{name}", whole[: chance.randrange(1, len(whole))]
        for number in range(flips):
            content = bytearray(whole)
            # In half of them the header is hit, where most decisions are made.
            reach = len(content) if number % 2 else min(len(content), 512)
            for _ in range(chance.randint(1, 24)):
                content[chance.randrange(reach)] ^= 1 << chance.randrange(8)
            yield f"flipped/{number}-{name}", bytes(content)


# --- what claims or takes more than it has ---


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"", packed: bytes | None = None) -> bytes:
    """A PNG of RGB pixels (W3C PNG, section 5) with these chunks before its data, which may be packed already."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", packed or zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def inflating(megabytes: int) -> bytes:
    """Some kilobytes that zlib makes so many megabytes of."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def small_png(*chunks: tuple[bytes, bytes]) -> bytes:
    return png(4, 4, *chunks, data=bytes(4 * 13))


def tiff(*tags: tuple[int, int, int, int], following: int = 0, body: bytes = b"") -> bytes:
    """A TIFF of these tags (number, type, count, value or offset; TIFF 6.0, section 2)."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", following) + body


def tiff_of(width: int, height: int, **options: int) -> bytes:
    """A TIFF that claims grey pixels of this size, and has almost none."""
    return tiff(
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 134),
        (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, options.get("strip", 16)), body=bytes(64),
        following=options.get("following", 0),
    )  # fmt: skip


def exif(body: bytes) -> bytes:
    """A JPEG whose EXIF is this."""
    whole = good(0)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body + whole[2:]


def claiming_images() -> dict[str, bytes]:
    """Small pictures of enormous claims."""
    whole, size = good(0), struct.pack(">HH", 128, 128)
    bmp, webp = images()["plain.bmp"], images()["lossless.webp"]
    jumbo = struct.pack("<ii", 60_000, 60_000)
    # A canvas of 24 bits a side (RFC 9649, section 2.7), and no picture for it.
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2
    return {
        "claims.png": png(100_000, 100_000),
        "most.png": png(2**31 - 1, 2**31 - 1),
        "line.png": png(2**31 - 1, 1),
        "claims.jpg": whole.replace(size, struct.pack(">HH", 65_500, 65_500), 1),
        "claims.bmp": bmp[:18] + jumbo + bmp[26:],
        "negative.bmp": bmp[:18] + struct.pack("<ii", -(2**31), -(2**31)) + bmp[26:],
        "canvas.webp": b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas,
        "length.webp": webp[:4] + b"\xff\xff\xff\x7f" + webp[8:],
        "claims.tif": tiff_of(100_000, 100_000),
        "most.tif": tiff_of(2**32 - 1, 2**32 - 1),
        "strips.tif": tiff_of(4000, 4000, strip=2**32 - 1),
        "loop.tif": tiff_of(4, 4, following=8),
        "tags.tif": tiff((256, 4, 2**31, 8), (257, 4, 2**31, 8), (273, 4, 2**32 - 1, 8)),
        "loop-in-exif.jpg": exif(tiff((0x8769, 4, 1, 8), following=8)),
        "count-in-exif.jpg": exif(tiff((0x9003, 2, 2**32 - 1, 8), (0x8769, 4, 2**30, 0))),
    }


def greedy_images() -> dict[str, bytes]:
    """Pictures that are small, with much beside them, or little that takes long."""
    whole = good(0)
    comment = b"\xff\xfe" + struct.pack(">H", 65_535) + bytes(65_533)
    laughs = b"".join(b'<!ENTITY l%d "%s">' % (n, b"&l%d;" % (n - 1) * 10) for n in range(1, 12))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<!DOCTYPE x [" + b'<!ENTITY l0 "ha">' + laughs + b"]><x>&l11;</x>"
    return {
        "text-inflates.png": small_png((b"zTXt", b"Comment\0\0" + inflating(512))),
        "itext-inflates.png": small_png((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + inflating(512))),
        "profile-inflates.png": small_png((b"iCCP", b"icc\0\0" + inflating(512))),
        "data-inflates.png": png(4, 4, data=bytes(2**28)),
        "much-text.png": small_png((b"tEXt", b"Comment\0" + b"x" * (24 * 2**20))),
        "many-texts.png": small_png(*[(b"tEXt", b"Comment\0x")] * 100_000),
        "comments.jpg": whole[:2] + comment * 300 + whole[2:],
        "laughs.jpg": whole[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + whole[2:],
        "passes.jpg": scan_bomb(50_000),
        "large-passes.jpg": scan_bomb(2_000, (6000, 6000)),
    }


def bombs_within_limits() -> dict[str, bytes]:
    """A few kilobytes each of just as many pixels as are allowed: what decoding takes at most."""
    found = {}
    for name, mode, size, kind, options in (
        ("alpha.png", "RGBA", (8000, 7990), "PNG", {}),
        ("alpha.webp", "RGBA", (8000, 7990), "WEBP", {"lossless": True, "method": 0, "quality": 0}),
        ("progressive.jpg", "RGB", (8000, 7990), "JPEG", {"progressive": True, "quality": 5}),
        ("deflate.tif", "RGBA", (8000, 7990), "TIFF", {"compression": "tiff_adobe_deflate"}),
    ):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


@lru_cache
def many_references() -> bytes:
    """An H.264 video of frames as large as allowed whose decoder has to keep sixteen of them."""
    buffer = io.BytesIO()
    side = 5984
    with av.open(buffer, "w", format="matroska") as file:
        x264 = "ref=16:bframes=0:scenecut=0:keyint=100"
        options = {"preset": "ultrafast", "crf": "51", "x264-params": x264}
        stream = file.add_stream("libx264", rate=1, options=options)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(side, side, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(20):
            frame.pts, frame.time_base = number, Fraction(1)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def greedy_videos() -> dict[str, bytes]:
    """Videos of enormous claims and lengths."""
    mp4 = video()
    stbl = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
    huge = struct.pack(">I", 2**32 - 1)
    return {
        **claims(),
        "passes.avi": mjpeg(scan_bomb(50_000), scan_bomb(50_000)),
        "large-passes.avi": mjpeg(scan_bomb(2_000, (4000, 4000)), size=(4000, 4000)),
        "days.mkv": make_video("matroska", times=[0, 4 * 86_400]),
        "months.mkv": make_video("matroska", times=[0, 90 * 86_400]),
        "sizes.mp4": edited(mp4, (*stbl, b"stsz"), lambda body: bytes(4) + b"\0\0\0\1" + huge),
        "times.mp4": edited(mp4, (*stbl, b"stts"), lambda body: body[:4] + struct.pack(">III", 1, 2**32 - 1, 1)),
        "runs.mp4": edited(mp4, (*stbl, b"stts"), lambda body: body[:4] + huge + body[8:]),
        "length.mp4": edited(mp4, (b"moov", b"mvhd"), lambda body: body[:16] + huge + body[20:]),
        "box.mp4": mp4[:4] + b"ftyp" + struct.pack(">IQ", 1, 2**63 - 1) + mp4[8:],
        "many-boxes.mp4": mp4[:32] + struct.pack(">I4s", 8, b"free") * 200_000 + mp4[32:],
        "tags.mkv": make_video("matroska", frames=10, metadata={"comment": "x" * (8 * 2**20)}),
        "tags.mp4": make_video("mp4", frames=10, metadata={"comment": "x" * (8 * 2**20)}),
        "frames.gif": _many_frames(20_000),
        "id3.ts": b"ID3\4\0\0\x7f\x7f\x7f\x7f" + video("mpegts"),
    }


def _many_frames(count: int) -> bytes:
    """A GIF (89a, section 20) of so many frames of one pixel on a large screen, all shown for no time."""
    control = b"!\xf9\4\0\0\0\0\0"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", 1000, 1000, 0x80, 0, 0) + bytes(6) + (control + frame) * count + b";"


# --- what points elsewhere, and what is something else ---


def pointers(canaries: Canaries) -> dict[str, bytes]:
    """Files that name the canaries in all the ways in which a reader of media opens another file or address."""
    found = {}
    for name, target in (("address", canaries.url), ("file", canaries.path), ("plain", f"file:{canaries.path}")):
        key = f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n'
        init = f'#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MAP:URI="{target}"\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n'
        mpd = (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration='
            '"PT10S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
            f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
        )
        entity = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "{target}">]>'
        svg = f'{entity}<svg xmlns="http://www.w3.org/2000/svg"><image href="{target}"/><text>&x;</text></svg>'
        found |= {
            f"hls-{name}.mp4": hls(target),
            f"hls-{name}.ts": hls(target),
            # Its first bytes pass for those of an MP4, which is then what it is taken for.
            f"masked-{name}.mp4": b"#---free\n" + hls(target),
            f"key-{name}.mkv": key.encode(),
            f"map-{name}.mp4": init.encode(),
            f"behind-a-video-{name}.ts": video("mpegts") + hls(target),
            f"ffconcat-{name}.mkv": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
            f"concat-{name}.avi": f"concat:{target}|{target}".encode(),
            f"subfile-{name}.mov": f"subfile,,start,0,end,9,,:{target}".encode(),
            f"name-{name}.gif": str(target).encode(),
            f"dash-{name}.webm": mpd.encode(),
            f"sdp-{name}.ts": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={target}\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"
            "a=rtpmap:96 H264/90000\n".encode(),
            f"smil-{name}.mov": f'<smil><body><video src="{target}"/></body></smil>'.encode(),
            f"asx-{name}.avi": f'<asx version="3"><entry><ref href="{target}"/></entry></asx>'.encode(),
            f"subtitles-{name}.mkv": f"1\n00:00:00,000 --> 00:00:09,000\n{{\\img({target})}}\n".encode(),
            f"pattern-{name}.gif": f"{target}%03d.jpg".encode(),
            f"movie-{name}.mov": _reference_movie(str(target)) + video("mov"),
            f"svg-{name}.jpg": svg.encode(),
            f"svg-{name}.png": gzip.compress(svg.encode()),
            f"eps-{name}.tif": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({target}) (r) file\n".encode(),
            f"pdf-{name}.jpg": f"%PDF-1.7\n1 0 obj<</Type/Action/S/URI/URI({target})>>endobj\n%%EOF".encode(),
            f"mvg-{name}.png": f"push graphic-context\nimage over 0,0 9,9 '{target}'\npop graphic-context\n".encode(),
            f"url-{name}.mp4": edited(video(), DREF, lambda _, target=target: url_of(str(target))),
            f"index-first-{name}.mov": b"\0\0\0\x08wide" + hls(target),
        }  # fmt: skip
    found["alias.mov"] = edited(video(), DREF, lambda _: alias_to(canaries.path))
    return found


def _reference_movie(target: str) -> bytes:
    """A QuickTime movie that is another one (QuickTime File Format, "Reference Movies")."""
    text = target.encode() + b"\0"
    body = bytes(4) + b"url " + struct.pack(">I", len(text)) + text
    for kind in (b"rdrf", b"rmda", b"rmra", b"moov"):
        body = struct.pack(">I4s", len(body) + 8, kind) + body
    return body


class _Touching:
    """What unpickling makes of it is a call that creates a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._path, "w")


def pickle_that_touches(path: str) -> bytes:
    """A pickle that creates a file when it is loaded."""
    return pickle.dumps(_Touching(path))


def something_else(canaries: Canaries) -> dict[str, bytes]:
    """Files that are no picture or video at all, or two things at once."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(20):
            file.writestr(f"{number}", bytes(2**24))
    touching = pickle_that_touches(str(canaries.path.with_name("touched")))
    found = {}
    for suffix in ("jpg", "mp4"):
        found |= {
            f"empty.{suffix}": b"",
            f"one-byte.{suffix}": b"\xff",
            f"nuls.{suffix}": bytes(100_000),
            f"ones.{suffix}": b"\xff" * 100_000,
            f"noise.{suffix}": random.Random(1).randbytes(100_000),
            f"lines.{suffix}": b"\n" * 100_000,
            f"archive.{suffix}": archive.getvalue(),
            f"inflating.{suffix}": gzip.compress(bytes(2**26)),
            f"pickle.{suffix}": touching,
            f"program.{suffix}": b"\x7fELF\2\1\1" + bytes(500),
            f"script.{suffix}": b"#!/bin/sh\ntouch touched\n",
            f"page.{suffix}": b"<!doctype html><script>alert(1)</script>",
            f"layers.{suffix}": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3),
            f"radiance.{suffix}": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 100000 +X 100000\n",
            f"icon.{suffix}": b"\0\0\1\0\xff\xff" + bytes(100),
            f"fits.{suffix}": b"SIMPLE  =                    T".ljust(2880),
        }
    return found
