"""What videos cost: bytes, decoding, memory, the pipeline around the models, and all of it against the notebook's loop.

The claims, each a ratio within one run:
- a chunk of a large file costs at most 1.5 times its own bytes plus the file's index plus 1 MB, wherever the index is;
- keyframes are decoded at least 4 times cheaper than everything;
- the pipeline takes at most 15 % more CPU time than decoding and the models alone;
- with the notebook's detector weights and classifier and no wider crops, at least 3 times its frames per second, with
  at least 99 % the same faces and labels; with the shipped defaults at least 10 times;
- a worker's memory is under 1.5 GB on an hour of 4K video, and the same as on a minute.

    python -m benchmarks.video [--only bytes --only decoding ...] [--data FOLDER] [--json]
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import click
import numpy as np

from benchmarks.models import machine
from common.domain import MaskwatchError
from common.models.pipeline import pipeline_spec

BYTES_RATIO, BYTES_SLACK = 1.5, 2**20
KEYFRAMES_BAR = 4.0
CPU_BAR = 1.15
TWIN_BAR, SHIPPED_BAR, SAME_BAR = 3.0, 10.0, 0.99
MEMORY_MB, MEMORY_GROWTH = 1500, 1.1
ROUNDS = 3

PARTS = ("bytes", "decoding", "pipeline", "notebook", "memory")


@click.command()
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Some parts; memory takes a quarter of an hour.")
@click.option(
    "--data",
    envvar="MASKWATCH_TEST_DATA",
    type=click.Path(path_type=Path),
    help="The shared data set, for the notebook's weights (default: MASKWATCH_TEST_DATA, or those that are imported).",
)
@click.option("--quick", is_flag=True, help="Small files, one round: that it runs.")
@click.option("--json", "as_json", is_flag=True)
def main(only: tuple[str, ...], data: Path | None, quick: bool, as_json: bool) -> None:
    """Measure what videos cost on this machine."""
    result: dict[str, Any] = {"machine": machine(None)}
    with tempfile.TemporaryDirectory(prefix="maskwatch-bench-") as name:
        folder = Path(name)
        for part in only or PARTS:
            if part == "bytes":
                result[part] = bytes_read(folder, seconds=24 if quick else 90)
            elif part == "decoding":
                result[part] = keyframes(folder, seconds=4 if quick else 20, rounds=1 if quick else ROUNDS)
            elif part == "pipeline":
                result[part] = pipeline(folder, rounds=1 if quick else ROUNDS, limit=10 if quick else 120)
            elif part == "notebook":
                try:
                    result[part] = notebook(folder, data, limit=4 if quick else 80)
                except MaskwatchError as error:
                    if only:
                        raise click.ClickException(str(error)) from error
                    result["left_out"] = f"the notebook's loop: {error}"
            else:
                result[part] = memory(folder, (4, 12) if quick else (60, 3600))
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


# --- bytes ------------------------------------------------------------------------------------------------


def bytes_read(folder: Path, seconds: int) -> list[dict[str, Any]]:
    """Bytes fetched for the chunk [20 s, 30 s) of a file with its index in front, and behind."""
    from common.settings import StorageSettings
    from common.storage.blocks import BlockReader
    from workers.media.containers import VideoFile
    from workers.media.sampling import Grid, Sampler

    settings = StorageSettings()
    rows = []
    start, stop = (8, 16) if seconds < 60 else (20, 30)
    for place, options in (("front", {"movflags": "faststart"}), ("end", {})):
        path = folder / f"noise-{place}.mp4"
        encode(path, noise(640, 360), seconds, fps=10, size=(640, 360), gop=20, options=options)
        data = path.read_bytes()
        own = chunk_bytes(path, start, stop)
        fetch = lambda a, b, data=data: data[a:b]  # noqa: E731 - a server would do the same
        with BlockReader(
            fetch, len(data), block_bytes=settings.block_bytes, cached_blocks=settings.cached_blocks, tries=1
        ) as reader:
            video = VideoFile(reader, max_pixels=10**8, threads=1)
            taken = list(Sampler(video, Grid(Fraction(1)), _mode("frames"), start, stop))
            video.close()
            fetched = reader.fetched_bytes
        assert len(taken) == stop - start
        index = index_bytes(data)
        allowed = BYTES_RATIO * own + index + BYTES_SLACK
        rows.append(
            {
                "index_at": place, "file_bytes": len(data), "chunk_bytes": own, "index_bytes": index,
                "fetched_bytes": fetched, "allowed_bytes": allowed, "of_chunk": (fetched - index) / own,
            }
        )  # fmt: skip
    return rows


def chunk_bytes(path: Path, start: int, stop: int) -> int:
    """What a player would say that a chunk's frames take in the file."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        packets = (packet for packet in file.demux(stream) if packet.pts is not None)
        return sum(packet.size for packet in packets if start <= packet.pts * stream.time_base < stop)


def index_bytes(data: bytes) -> int:
    """The size of an MP4's moov box."""
    position = 0
    while position < len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind == b"moov":
            return size
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        position += size
    raise ValueError("no moov box")


# --- decoding ---------------------------------------------------------------------------------------------


def keyframes(folder: Path, seconds: int, rounds: int) -> dict[str, Any]:
    """CPU time of decoding 1080p30 H.264 with a keyframe each second or two: everything, and as it is sampled."""
    path = folder / "hd.mp4"
    encode(path, moving(1920, 1080), seconds, fps=30, size=(1920, 1080), gop=60, options={}, bframes=2)

    def everything() -> int:
        with opened(path) as video:
            context = video.stream.codec_context
            frames = sum(len(context.decode(packet)) for packet in video.packets())
            return frames + len(context.decode(None))

    def sampled(mode: str, fps: str) -> Callable[[], int]:
        from workers.media.sampling import Grid, Sampler

        def run() -> int:
            with opened(path) as video:
                return sum(1 for _ in Sampler(video, Grid(Fraction(fps)), _mode(mode), 0, None))

        return run

    ways = {
        "everything": everything,
        "frames at 1/s": sampled("frames", "1"),
        "keyframes at 1/s": sampled("keyframes", "1"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for _ in range(rounds):
        for name, way in ways.items():
            counts[name], spent = cpu_time(way)
            times[name].append(spent)
    best = {name: min(values) for name, values in times.items()}
    return {
        "video_seconds": seconds,
        "cpu_seconds": best,
        "frames": counts,
        "keyframes_cheaper": best["everything"] / best["keyframes at 1/s"],
        "frames_cheaper": best["everything"] / best["frames at 1/s"],
    }


# --- the pipeline around the models -----------------------------------------------------------------------


def pipeline(folder: Path, rounds: int, limit: int) -> dict[str, Any]:
    """CPU time of a video's way from its file to faces, every frame of it, against a loop of decoding and models."""
    from common.settings import get_settings
    from workers.analysis.load import load_analyzer
    from workers.analysis.video import SampledFrame, analyze_frames
    from workers.inference import Runtime
    from workers.media.frames import to_rgb
    from workers.media.sampling import Grid, Sampler

    path = sample_video(folder)
    analyzer = load_analyzer(pipeline_spec(get_settings()), Runtime(threads=1))
    worker = get_settings().worker

    def alone() -> int:
        with opened(path) as video:
            faces = frames = 0
            for packet in video.packets():
                for frame in packet.decode():
                    if frames < limit:
                        faces += len(analyzer.analyze(to_rgb(frame)))
                        frames += 1
                if frames == limit:
                    return faces
        return faces

    def whole() -> int:
        with opened(path) as video:
            rate = float(video.stream.average_rate)
            grid = Grid(Fraction(str(rate)))
            taken = (
                SampledFrame(to_rgb(s.frame), s.at, Fraction(1))
                for s in Sampler(video, grid, _mode("frames"), 0, limit)
            )
            buffer = {"buffer_bytes": worker.frame_buffer_bytes, "batch": worker.batch_frames}
            return sum(len(frame.faces) for frame in analyze_frames(taken, analyzer, rate, **buffer))

    alone()  # warm
    ratios, spent = [], []
    for _ in range(rounds):
        faces_alone, cpu_alone = cpu_time(alone)
        faces_whole, cpu_whole = cpu_time(whole)
        assert faces_alone == faces_whole, (faces_alone, faces_whole)
        ratios.append(cpu_whole / cpu_alone)
        spent.append((1000 * cpu_alone / limit, 1000 * cpu_whole / limit))
    middle = sorted(range(rounds), key=ratios.__getitem__)[rounds // 2]
    return {
        "frames": limit,
        "faces": faces_whole,
        "alone_cpu_ms": spent[middle][0],
        "pipeline_cpu_ms": spent[middle][1],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


# --- against the notebook ---------------------------------------------------------------------------------


def notebook(folder: Path, data: Path | None, limit: int) -> dict[str, Any]:
    """Frames per second of the notebook's loop and of ours over the same frames, and how far they agree."""
    from benchmarks.agreement import Agreement, twin_spec
    from benchmarks.notebook_baseline import NotebookLoop, models_from, run_video
    from common.machine import usable_cores
    from common.settings import get_settings
    from workers.analysis.load import load_analyzer
    from workers.inference import Runtime

    weights = data and data / "weights"
    path = sample_video(folder)
    with models_from(weights):
        runtime = Runtime(threads=usable_cores())
        twin, shipped = twin_spec(), pipeline_spec(get_settings())
        analyzers = {"twin": load_analyzer(twin, runtime), "shipped": load_analyzer(shipped, runtime)}
        loops = {"mirrored": NotebookLoop(), "plain": NotebookLoop(mirrored=False)}
        for loop in loops.values():
            run_video(path, loop, limit=2)
        rates: dict[str, float] = {}
        for name, loop in loops.items():
            run = run_video(path, loop, limit=limit, draw_to=folder / f"{name}.mp4")
            rates[name] = run.frames / run.seconds
        found = {}
        for name, analyzer in analyzers.items():
            through_ours(path, analyzer, 2)
            started = time.perf_counter()
            found[name] = through_ours(path, analyzer, limit)
            rates[name] = len(found[name]) / (time.perf_counter() - started)
        same = Agreement()
        for frame, faces in zip(frames_rgb_of(path, limit), found["twin"], strict=True):
            same.add(loops["mirrored"].frame(frame), faces)
    return {
        "frames": limit,
        "faces": sum(len(faces) for faces in found["twin"]),
        "frames_per_s": rates,
        "agreement": same.figures(),
        "twin_faster": rates["twin"] / rates["mirrored"],
        "twin_faster_than_plain": rates["twin"] / rates["plain"],
        "shipped_faster": rates["shipped"] / rates["plain"],
    }


def through_ours(path: Path, analyzer: Any, limit: int) -> list[Any]:
    """The faces of the first frames of a video, every one of them, by our pipeline."""
    from common.settings import get_settings
    from workers.analysis.video import SampledFrame, analyze_frames
    from workers.media.frames import to_rgb
    from workers.media.sampling import Grid, Sampler

    worker = get_settings().worker
    with opened(path) as video:
        rate = video.stream.average_rate
        taken = (
            SampledFrame(to_rgb(s.frame), s.at, Fraction(1))
            for s in Sampler(video, Grid(Fraction(rate)), _mode("frames"), 0, limit)
        )
        buffer = {"buffer_bytes": worker.frame_buffer_bytes, "batch": worker.batch_frames}
        return [frame.faces for frame in analyze_frames(taken, analyzer, float(rate), **buffer)]


def frames_rgb_of(path: Path, limit: int) -> Iterator[Any]:
    from workers.media.frames import to_rgb

    with opened(path) as video:
        count = 0
        for packet in video.packets():
            for frame in packet.decode():
                if count < limit:
                    yield to_rgb(frame)
                count += 1


# --- memory -----------------------------------------------------------------------------------------------


def memory(folder: Path, lengths: tuple[int, int]) -> dict[str, Any]:
    """The peak memory of one process that analyses a 4K video at 1 frame/s in one chunk, models included."""
    rows = []
    for seconds in lengths:
        path = folder / f"uhd-{seconds}.mp4"
        encode(path, crowd(3840, 2160), seconds, fps=1, size=(3840, 2160), gop=30, options={})
        command = [sys.executable, "-m", "benchmarks.video_memory", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ)
        rows.append({"seconds": seconds, **json.loads(done.stdout)})
        path.unlink()
    return {"rows": rows, "growth": rows[-1]["peak_mb"] / rows[0]["peak_mb"]}


# --- small parts ------------------------------------------------------------------------------------------


def _mode(name: str) -> Any:
    from common.domain import SampleMode

    return SampleMode(name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    from workers.media.containers import VideoFile

    class Bytes(io.BytesIO):
        error = None
        size = path.stat().st_size

    video = VideoFile(Bytes(path.read_bytes()), max_pixels=10**8, threads=1)
    try:
        yield video
    finally:
        video.close()


def cpu_time(work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work returned, and the CPU seconds of this process it took, all threads."""
    before = time.process_time()
    result = work()
    return result, time.process_time() - before


def sample_video(folder: Path) -> Path:
    """The demo's video: people that walk by, some with masks."""
    from common.sample.footage import make_footage

    if not (folder / "footage").exists():
        make_footage(folder / "footage", images_per_camera=1)
    return max((folder / "footage" / "bucket").rglob("*.mp4"), key=lambda path: path.stat().st_size)


Painter = Callable[[int], Any]


def noise(width: int, height: int) -> Painter:
    """Frames that nothing compresses, so that a short file is a large one."""
    rng = np.random.default_rng(3)
    tiles = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(4)]
    return lambda number: tiles[number % 4] ^ np.uint8(number % 64)


def moving(width: int, height: int) -> Painter:
    """A textured scene that moves as a slow camera does."""
    rng = np.random.default_rng(4)
    coarse = rng.integers(40, 215, (height // 16 + 8, width // 16 + 8, 3), dtype=np.uint8)
    scene = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    return lambda number: scene[number % 64 : number % 64 + height, number % 32 : number % 32 + width]


def crowd(width: int, height: int) -> Painter:
    """Faces all over a large frame, another light in each."""
    from PIL import Image

    from common.sample.source_images import astronaut

    face = Image.fromarray(astronaut()).resize((240, 240))
    frame = Image.new("RGB", (width, height), (90, 110, 130))
    for x in range(100, width - 240, 700):
        for y in range(100, height - 240, 600):
            frame.paste(face, (x, y))
    pixels = np.asarray(frame)
    return lambda number: np.clip(pixels.astype(np.int16) + (number % 8 - 4), 0, 255).astype(np.uint8)


def encode(
    path: Path, paint: Painter, seconds: int, *, fps: int, size: tuple[int, int], gop: int, options: dict[str, str],
    bframes: int = 0,
) -> None:  # fmt: skip
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "x264-params": "scenecut=0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = bframes
        for number in range(seconds * fps):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(paint(number)), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people, each beside its bar."""
    about = result["machine"]
    text = [f"{about['cpu']}, {about['cores']} cores, load {about['load_before']:.1f} before"]
    for row in result.get("bytes", []):
        text.append(
            f"one chunk of {row['file_bytes'] / 1e6:.0f} MB, index at the {row['index_at']}: "
            f"{row['fetched_bytes'] / 1e6:.2f} MB fetched for {row['chunk_bytes'] / 1e6:.2f} MB and "
            f"{row['index_bytes'] / 1e3:.0f} kB of index (the bar: {row['allowed_bytes'] / 1e6:.2f} MB)"
        )
    if (row := result.get("decoding")) is not None:
        spent = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in row["cpu_seconds"].items())
        text += [
            f"decoding {row['video_seconds']} s of 1080p30: {spent}",
            f"  keyframes are {row['keyframes_cheaper']:.1f} times cheaper than everything (the bar: "
            f"{KEYFRAMES_BAR:.0f}), frames at 1/s {row['frames_cheaper']:.1f} times",
        ]
    if (row := result.get("pipeline")) is not None:
        text.append(
            f"pipeline: {row['pipeline_cpu_ms']:.1f} ms CPU per frame, decoding and models alone "
            f"{row['alone_cpu_ms']:.1f}: {row['ratio']:.3f} (the bar: {CPU_BAR})"
        )
    if (row := result.get("notebook")) is not None:
        rates = ", ".join(f"{name} {value:.2f}" for name, value in row["frames_per_s"].items())
        text += [
            f"frames per second over {row['frames']} frames with {row['faces']} faces: {rates}",
            f"  the notebook's models in ours: {row['twin_faster']:.1f} times the loop (the bar: {TWIN_BAR:.0f}), "
            f"{row['twin_faster_than_plain']:.1f} times the loop without mirror images; "
            f"the shipped defaults {row['shipped_faster']:.1f} times (the bar: {SHIPPED_BAR:.0f})",
            f"  agreement: {row['agreement']} (the bar: {SAME_BAR:.0%})",
        ]
    if (reason := result.get("left_out")) is not None:
        text.append(f"not measured, {reason}")
    if (row := result.get("memory")) is not None:
        text += [
            f"4K, {each['seconds']} frames: {each['peak_mb']:.0f} MB at its peak (the bar: {MEMORY_MB})"
            for each in row["rows"]
        ]
        text.append(f"  the hour takes {row['growth']:.2f} times the minute (the bar: {MEMORY_GROWTH})")
    return text


if __name__ == "__main__":
    main()
