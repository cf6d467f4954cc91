"""`maskwatch evaluate detectors`: every detector on the same labelled scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from common.cli.parts import console
from common.domain import MaskwatchError, PermanentJobError, PipelineSpec
from common.reporting.tables import percent
from common.settings import Settings, get_settings
from workers.cli.evaluate_output import chosen_spec, prepare_folder, write_metrics
from workers.detection import FaceDetector
from workers.detection.registry import detector_names, load_detector
from workers.evaluation import plots
from workers.evaluation.detectors import CURVE_FROM, DetectorResults, evaluate_detector
from workers.evaluation.faces import COMBINED_BINS, SIZE_BINS
from workers.inference import Runtime, limit_opencv_threads, runtime_of


def run(folder: Path, only: Sequence[str], out: Path | None, *, as_json: bool) -> None:
    """Evaluate, draw and print."""
    prepare_folder(out)
    settings = get_settings()
    runtime = runtime_of(settings, processes=1)
    limit_opencv_threads(runtime.threads)
    loaded: dict[str, _Loaded] = {}
    left_out: dict[str, str] = {}
    # All are loaded first, so that missing weights are reported before minutes go into the others.
    for name in dict.fromkeys(only) or detector_names():
        try:
            loaded[name] = _load(settings, name, runtime)
        except _NOT_HERE as error:
            if only:
                raise
            left_out[name] = _reason(error)
            console.note(f"left out: {name}: {left_out[name]}")
    if not loaded:
        raise MaskwatchError(
            "no detector has its weights on this machine; `maskwatch models list` shows where to get them"
        )
    results = {name: _run(folder, name, each, settings.worker.max_image_pixels) for name, each in loaded.items()}
    summaries = {
        name: {
            "sha256": each.spec.detector.sha256, "threshold": each.spec.detector_threshold, **results[name].summary(),
        }
        for name, each in loaded.items()
    }  # fmt: skip
    unreadable = next(iter(results.values())).unreadable
    console.note_unreadable(unreadable)
    values = {
        "folder": str(folder),
        "threads": runtime.threads,
        "device": runtime.device,
        "engine": runtime.engine.value,
        "unreadable": [{"file": file, "reason": reason} for file, reason in unreadable],
        "detectors": summaries,
        "left_out": left_out,
    }
    if out is not None:
        _draw_detectors(out, results, summaries)
        write_metrics(out, values)
    if as_json:
        console.print_json(values)
    else:
        _print_detectors(folder, values)


#: What loading a detector raises if its weights or its package are not on this machine.
_NOT_HERE = (MaskwatchError, PermanentJobError, ModuleNotFoundError)


def _reason(error: Exception) -> str:
    return f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)


class _Loaded(NamedTuple):
    """A loaded detector, at the threshold of its pipeline and at that of the curve."""

    spec: PipelineSpec
    at_threshold: FaceDetector
    down_to_curve: FaceDetector


def _load(settings: Settings, name: str, runtime: Runtime) -> _Loaded:
    spec = chosen_spec(settings, name, None)
    low = replace(spec, detector_threshold=min(CURVE_FROM, spec.detector_threshold))
    return _Loaded(spec, load_detector(spec, runtime), load_detector(low, runtime))


def _run(folder: Path, name: str, loaded: _Loaded, max_pixels: int) -> DetectorResults:
    with console.bar(name) as bar:
        return evaluate_detector(
            folder, loaded.at_threshold, loaded.down_to_curve, max_pixels,
            on_image=bar.show,
        )  # fmt: skip


def _draw_detectors(out: Path, results: dict[str, DetectorResults], summaries: dict[str, dict[str, Any]]) -> None:
    plots.precision_recall(
        out / "precision_recall.png",
        {name: result.curve() for name, result in results.items()},
        {name: (row["recall"], row["precision"] or 0.0) for name, row in summaries.items()},
    )


def _print_detectors(folder: Path, values: dict[str, Any]) -> None:
    found = values["detectors"]
    first = next(iter(found.values()))
    sizes = (*SIZE_BINS, *COMBINED_BINS)
    order = sorted(found, key=lambda name: -found[name]["average_precision"])
    console.print_table(
        f"{first['images']} pictures of {folder} with {first['labelled_faces']} labelled faces; recall by size in px; "
        f"{values['engine']} on {values['device']}, {values['threads']} threads",
        ("detector", "threshold", "recall", *sizes, "precision", "average precision", "ms"),
        [
            (
                name, f"{row['threshold']:g}", percent(row["recall"]),
                *(percent(row["sizes"][size]["recall"]) for size in sizes),
                percent(row["precision"]), percent(row["average_precision"]), f"{row['median_ms']:.1f}",
            )
            for name, row in ((name, found[name]) for name in order)
        ],
    )  # fmt: skip
