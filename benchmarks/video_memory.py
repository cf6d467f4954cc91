"""The child process of `benchmarks.video`: analyses one chunk as a worker does and prints its own peak memory."""

from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from pathlib import Path

from common.models.pipeline import pipeline_spec
from common.settings import get_settings
from common.storage.opening import open_bucket
from common.storage.store import split_uri
from workers.analysis.load import load_analyzer
from workers.analysis.video import analyze_frames
from workers.inference import runtime_of
from workers.jobs.videos import sampled_frames
from workers.media.opening import opened
from workers.media.sampling import Grid, Sampler


def main(path: Path) -> None:
    """Analyse the whole of a video in one chunk, at one frame a second."""
    settings = get_settings()
    bucket, key = split_uri(f"file://{path.absolute()}")
    spec = pipeline_spec(settings)
    analyzer = load_analyzer(spec, runtime_of(settings, processes=1))
    started = time.perf_counter()
    with opened(open_bucket(bucket).stat(key), settings) as video:
        grid = Grid(Fraction(1))
        frames = list(
            analyze_frames(
                sampled_frames(Sampler(video, grid, spec.sample, 0, None), grid, None),
                analyzer,
                1.0,
                buffer_bytes=settings.worker.frame_buffer_bytes,
                batch=settings.worker.batch_frames,
            )
        )
    # In kB (proc_pid_status(5)). No `ru_maxrss`, for a child begins with its parent's.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    peak_mb = int(peak.split()[1]) / 1024
    faces = sum(len(frame.faces) for frame in frames)
    print(
        json.dumps({"frames": len(frames), "faces": faces, "peak_mb": peak_mb, "took": time.perf_counter() - started})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
