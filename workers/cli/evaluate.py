"""`maskwatch evaluate`: wiring between the command line, labelled data and the figures.

Models are imported when a command runs, so that --help is quick and a missing layer is named.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from common.cli import console
from common.cli.console import percent
from common.cli.options import runtime_options
from common.domain import MaskwatchError, PermanentJobError, PipelineSpec

if TYPE_CHECKING:
    from common.model_figures import Confusion
    from common.settings import Settings
    from workers.detection import FaceDetector
    from workers.inference import Runtime
    from workers.training.evaluate import FaceResults, Mistake
    from workers.training.evaluate_detectors import DetectorResults
    from workers.training.evaluate_scenes import SceneResults

FOLDER = click.argument("folder", type=click.Path(path_type=Path))
OUT = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
    help="Folder for metrics.json and plots; files of an earlier run are overwritten.",
)  # fmt: skip
CLASSIFIER = click.option(
    "--classifier", metavar="NAME",
    help="NAME or NAME@SHA256 (default: the configured one, MASKWATCH_PIPELINE__CLASSIFIER).",
)  # fmt: skip
DETECTOR = click.option(
    "--detector", metavar="NAME",
    help="NAME or NAME@SHA256, at its own threshold (default: the configured one, MASKWATCH_PIPELINE__DETECTOR).",
)  # fmt: skip

#: Smallest and largest size that faces can be scaled down to.
AT_PX = click.IntRange(8, 160)


#: The faces that were held out when the shipped classifiers were fitted.
HELD_OUT = Path(__file__).parents[1] / "classification" / "weights" / "held_out.txt"


@click.group()
def evaluate() -> None:
    """Measure detection and classification on labelled data."""


@evaluate.command()
@FOLDER
@DETECTOR
@CLASSIFIER
@OUT
@runtime_options
@console.json_option
def scenes(folder: Path, detector: str | None, classifier: str | None, out: Path | None, as_json: bool) -> None:
    """Run the whole pipeline on labelled scenes: what it finds, and how often it labels that right.

    FOLDER holds images/ and annotations/ (Pascal VOC). Found means: overlapping a labelled box by half (IoU 0.5). Sizes
    are the longer side of the labelled box. Balanced accuracy is the mean of both classes' recalls among found faces,
    by the larger probability. Calibration error is how far the confidence is from the share that is right.

    With --out also: reliability.png, confusion.png, precision_recall.png, and what went worst: mislabelled.png,
    missed.png, unlabelled.png (detections where nobody labelled a face).

    \b
    Examples:
      maskwatch evaluate scenes test-scenes/
      maskwatch evaluate scenes test-scenes/ --detector haar --out figures/ --json
    """
    from common.settings import get_settings
    from workers.inference import runtime_of
    from workers.pipeline import load_analyzer
    from workers.training.evaluate_scenes import evaluate_scenes

    _prepare_folder(out)
    settings = get_settings()
    spec = _spec(settings, detector, classifier)
    analyzer = load_analyzer(spec, runtime_of(settings, processes=1))
    with console.progress() as bar:
        task = bar.add_task("pictures", total=None)
        results = evaluate_scenes(
            folder, analyzer.analyze, settings.worker.max_image_pixels,
            on_image=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    console.note_unreadable(results.unreadable)
    summary = {"folder": str(folder), "pipeline": spec.as_dict(), **results.summary(spec.uncertain_below)}
    if out is not None:
        _draw_scenes(out, results, summary)
        _write_metrics(out, summary)
    if as_json:
        console.print_json(summary)
    else:
        _print_scenes(folder, spec, summary)


@evaluate.command()
@FOLDER
@CLASSIFIER
@click.option("--held-out", is_flag=True, help="Only faces that no training of the shipped classifiers ever saw.")
@click.option(
    "--only", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Only the faces this file names, one per line, as a training leaves in held_out.txt.",
)  # fmt: skip
@click.option("--at", "at_px", type=AT_PX, metavar="PX", help="Scale larger faces down to PX pixels first.")
@click.option(
    "--keep-confusion", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Also keep the confusion matrix there for `maskwatch pipelines list`, as common/model_figures.json does.",
)  # fmt: skip
@OUT
@runtime_options
@console.json_option
def faces(
    folder: Path,
    classifier: str | None,
    held_out: bool,
    only: Path | None,
    at_px: int | None,
    keep_confusion: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run the classifier alone on labelled faces: precision, recall and F1 as scikit-learn has them.

    FOLDER holds class folders (with_mask/, without_mask/, perhaps mask_weared_incorrect/), or images/ and annotations/,
    whose faces are then cut by their labels. Sizes are the longer side of the face, as the classifier sees it: --at 20
    shows how it does on faces as small as distant cameras give. Also: masks worn wrongly, which should be called
    without_mask; calibration; and what share is `uncertain` at which threshold.

    With --out also: reliability.png, confusion.png and mislabelled.png, the surest mistakes.

    \b
    Examples:
      maskwatch evaluate faces test-faces/
      maskwatch evaluate faces faces/ --only trained/compact-field/held_out.txt
      maskwatch evaluate faces test-faces/ --at 20 --out figures/ --json
    """
    from common.settings import get_settings
    from workers.classification.registry import load_classifier
    from workers.inference import limit_opencv_threads, runtime_of
    from workers.training import dataset
    from workers.training.evaluate import evaluate_faces

    if held_out and only:
        raise MaskwatchError("--held-out and --only exclude each other")
    if keep_confusion is not None and at_px is not None:
        raise MaskwatchError("--keep-confusion is of faces at their own size: leave out --at")
    _prepare_folder(out)
    settings = get_settings()
    spec = _spec(settings, None, classifier)
    runtime = runtime_of(settings, processes=1)
    limit_opencv_threads(runtime.threads)
    loaded = load_classifier(spec, runtime)
    read = dataset.load([folder])
    console.note_unreadable(read.unreadable)
    named = HELD_OUT if held_out else only
    if named is not None:
        read.samples = dataset.named_in(read.samples, named)
    with console.progress() as bar:
        task = bar.add_task("faces", total=len(read.samples))
        results = evaluate_faces(
            read.samples, loaded.classify, at_px, on_faces=lambda done, total: bar.update(task, completed=done)
        )
    figures = results.summary(spec.uncertain_below)
    report = figures.pop("report_text")
    values = {
        "folder": str(folder),
        "held_out": held_out,
        "only": None if only is None else str(only),
        "at_px": at_px,
        "pipeline": spec.as_dict(),
        "unreadable": [{"file": name, "reason": reason} for name, reason in read.unreadable],
        **figures,
    }
    if keep_confusion is not None:
        from common import model_figures

        data = f"{len(read.samples)} faces of {folder.name}{', held out' if held_out else ''}"
        model_figures.keep_confusion(keep_confusion, _confusion_to_keep(spec, values, data))
    if out is not None:
        _draw_faces(out, results, values)
        _write_metrics(out, values)
    if as_json:
        console.print_json(values)
    else:
        click.echo(report)
        _print_faces(values)


@evaluate.command()
@FOLDER
@click.option("--only", multiple=True, metavar="NAME", help="Only this detector, NAME or NAME@SHA256; repeatable.")
@OUT
@runtime_options
@console.json_option
def detectors(folder: Path, only: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Run every detector on the same labelled scenes: recall per face size, precision, average precision, time.

    FOLDER holds images/ and annotations/ (Pascal VOC). Recall and precision are at the detector's own threshold and at
    an overlap of half (IoU 0.5), sizes the longer side of the labelled box. Average precision is the area under
    precision over recall, down to a score of 0.02. Time is the median of one picture, after a warm-up. Small pictures
    are enlarged as configured (MASKWATCH_PIPELINE__ENLARGE_BELOW_PX), save for fdet-*, which run as that package does.
    Detectors without their weights here are named with the reason.

    With --out also: precision_recall.png, a dot where each detector's own threshold lies.

    \b
    Examples:
      maskwatch evaluate detectors test-scenes/
      maskwatch evaluate detectors test-scenes/ --only centerface --only haar --out figures/
    """
    from common.settings import get_settings
    from workers.detection.registry import detector_names
    from workers.inference import limit_opencv_threads, runtime_of

    _prepare_folder(out)
    settings = get_settings()
    runtime = runtime_of(settings, processes=1)
    limit_opencv_threads(runtime.threads)
    loaded: dict[str, _Loaded] = {}
    left_out: dict[str, str] = {}
    # All of them first: what is missing should show before minutes went into the others.
    for name in dict.fromkeys(only) or detector_names():
        try:
            loaded[name] = _load(settings, name, runtime)
        except _NOT_HERE as error:
            if only:
                raise
            left_out[name] = _reason(error)
            console.note(f"left out: {name}: {left_out[name]}")
    if not loaded:
        raise MaskwatchError("no detector has its weights here; `maskwatch models list` shows where each comes from")
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
        _write_metrics(out, values)
    if as_json:
        console.print_json(values)
    else:
        _print_detectors(folder, values)


#: What loading a detector raises where something of it isn't on this machine.
_NOT_HERE = (MaskwatchError, PermanentJobError, ModuleNotFoundError)


def _reason(error: Exception) -> str:
    return f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)


class _Loaded(NamedTuple):
    """A detector, ready: as its pipeline has it, and with the threshold of the curve."""

    spec: PipelineSpec
    at_threshold: FaceDetector
    down_to_curve: FaceDetector


def _load(settings: Settings, name: str, runtime: Runtime) -> _Loaded:
    from workers.detection.registry import load_detector
    from workers.training.evaluate_detectors import CURVE_FROM

    spec = _spec(settings, name, None)
    low = replace(spec, detector_threshold=min(CURVE_FROM, spec.detector_threshold))
    return _Loaded(spec, load_detector(spec, runtime), load_detector(low, runtime))


def _run(folder: Path, name: str, loaded: _Loaded, max_pixels: int) -> DetectorResults:
    from workers.training.evaluate_detectors import evaluate_detector

    with console.progress() as bar:
        task = bar.add_task(name, total=None)
        return evaluate_detector(
            folder, loaded.at_threshold, loaded.down_to_curve, max_pixels,
            on_image=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip


def _spec(settings: Settings, detector: str | None, classifier: str | None) -> PipelineSpec:
    """The configured pipeline with other models where they are named; another detector has its own threshold."""
    changed: dict[str, Any] = {}
    if detector is not None:
        changed |= {"detector": detector, "detector_threshold": None}
    if classifier is not None:
        changed["classifier"] = classifier
    return settings.pipeline.model_copy(update=changed).spec()


def _prepare_folder(out: Path | None) -> None:
    """Makes the folder before any work is done, for a missing right to write should not show at the end."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"{out} can't be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise MaskwatchError(f"{out} can't be written to")


def _write_metrics(out: Path, values: dict[str, Any]) -> None:
    """After the plots: where metrics.json lies, everything does."""
    (out / "metrics.json").write_text(console.as_json(values) + "\n", encoding="utf-8")
    console.note(f"metrics.json and plots are in {out}")


def _confusion_to_keep(spec: PipelineSpec, values: dict[str, Any], data: str) -> Confusion:
    from common.model_figures import Confusion

    (configured,) = (row for row in values["uncertain"] if row["configured"])
    called = [
        (*decided, sum(every) - sum(decided))
        for decided, every in zip(configured["confusion"], values["all"]["confusion"], strict=True)
    ]
    return Confusion(
        classifier=spec.classifier.name, sha256=spec.classifier.sha256,
        with_mask=called[0], without_mask=called[1], uncertain_below=spec.uncertain_below, data=data,
    )  # fmt: skip


def _draw_grids(out: Path, grids: dict[str, tuple[str, Sequence[Mistake]]]) -> None:
    """A picture for every kind of mistake; none, and none of an earlier run, where there was no such mistake."""
    from workers.training import plots

    for name, (title, mistakes) in grids.items():
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)
        if mistakes:
            plots.grid(path, [entry.crop for entry in mistakes], [entry.words for entry in mistakes], title)


def _draw_scenes(out: Path, results: SceneResults, summary: dict[str, Any]) -> None:
    from workers.training import plots
    from workers.training.calibration import reliability_bins
    from workers.training.evaluate import JUDGED_FROM_PX

    faces_meant = f"found faces of {JUDGED_FROM_PX:.0f} px and more"
    plots.reliability(out / "reliability.png", reliability_bins(*results.judged()), faces_meant)
    plots.confusion(out / "confusion.png", summary["judged"]["confusion"], faces_meant)
    name = summary["pipeline"]["detector"]["name"]
    plots.precision_recall(
        out / "precision_recall.png", {name: results.detections.curve(summary["labelled_faces"])},
        {name: (summary["recall"], summary["precision"] or 0.0)}, "down to the pipeline's threshold",
    )  # fmt: skip
    _draw_grids(
        out,
        {
            "mislabelled": ("Called the other class, the surest first", results.mislabelled),
            "missed": ("Labelled and not found, the largest first", results.missed),
            "unlabelled": ("Found and not labelled, the surest first", results.unlabelled),
        },
    )


def _draw_faces(out: Path, results: FaceResults, values: dict[str, Any]) -> None:
    from workers.training import plots
    from workers.training.calibration import reliability_bins

    plots.reliability(out / "reliability.png", reliability_bins(results.probabilities, results.labels))
    plots.confusion(out / "confusion.png", values["all"]["confusion"])
    _draw_grids(out, {"mislabelled": ("Called the other class, the surest first", results.mislabelled())})


def _draw_detectors(out: Path, results: dict[str, DetectorResults], summaries: dict[str, dict[str, Any]]) -> None:
    from workers.training import plots

    plots.precision_recall(
        out / "precision_recall.png",
        {name: result.curve() for name, result in results.items()},
        {name: (row["recall"], row["precision"] or 0.0) for name, row in summaries.items()},
    )


def _print_scenes(folder: Path, spec: PipelineSpec, summary: dict[str, Any]) -> None:
    from workers.training.evaluate import JUDGED_FROM_PX, confusion_rows

    columns = (
        "size in px", "labelled", "found", "recall", "balanced accuracy", "calibration error", "uncertain",
        "without uncertain",
    )  # fmt: skip
    console.print_table(
        f"{summary['images']} pictures of {folder}: {spec.detector.name} at {spec.detector_threshold:g}, "
        f"{spec.classifier.name}",
        columns,
        [_size_row(name, row) for name, row in summary["sizes"].items()],
    )
    judged = summary["judged"]
    # Sentences stand above their tables: as titles they would be broken to the table's width.
    _print_line(
        f"Found faces of {JUDGED_FROM_PX:.0f} px and more: balanced accuracy {percent(judged['balanced_accuracy'])}; "
        f"{percent(judged['uncertain_share'])} uncertain, else {percent(judged['certain_balanced_accuracy'])}"
    )
    console.print_table("", ("", "called with_mask", "called without_mask"), confusion_rows(judged))
    _print_calibration("The same faces", summary)
    worn_wrongly = judged["worn_wrongly"]
    _print_line(
        f"{summary['detections']} detections, precision {percent(summary['precision'])}, recall of all sizes "
        f"{percent(summary['recall'])}, average precision {percent(summary['average_precision'])} down to this "
        f"threshold; masks worn wrongly: {worn_wrongly['called_without_mask']} of {worn_wrongly['matched']} "
        "called without_mask"
    )


def _size_row(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        name, row["labelled"], row["matched"], percent(row["recall"]), percent(row["balanced_accuracy"]),
        _decimals(row["expected_calibration_error"]), percent(row["uncertain_share"]),
        percent(row["certain_balanced_accuracy"]),
    )  # fmt: skip


def _print_faces(values: dict[str, Any]) -> None:
    from workers.training.evaluate import confusion_rows

    seen = "" if values["at_px"] is None else f", larger ones seen at {values['at_px']} px"
    console.print_table(
        f"Balanced accuracy {percent(values['all']['balanced_accuracy'])}{seen}",
        ("size in px", "faces", "balanced accuracy"),
        [(name, row["faces"], percent(row["balanced_accuracy"])) for name, row in values["sizes"].items()],
    )
    console.print_table("", ("", "called with_mask", "called without_mask"), confusion_rows(values["all"]))
    _print_calibration("All faces", values)
    worn_wrongly = values["worn_wrongly"]
    _print_line(
        f"masks worn wrongly: {worn_wrongly['called_without_mask']} of {worn_wrongly['faces']} called without_mask"
    )


def _print_calibration(title: str, values: dict[str, Any]) -> None:
    calibration = values["calibration"]
    _print_line(
        f"{title}: calibration error {_decimals(calibration['expected_calibration_error'])}, "
        f"Brier score {_decimals(calibration['brier_score'])}, "
        f"log loss {_decimals(calibration['negative_log_likelihood'])}"
    )
    console.print_table(
        "",
        ("confidence", "faces", "mean", "right", "too sure by"),
        [
            (
                f"{row['low']:.2f}–{row['high']:.2f}", row["count"], _decimals(row["confidence"]),
                _decimals(row["accuracy"]), f"{row['gap']:+.3f}",
            )
            for row in calibration["bins"]
        ],
    )  # fmt: skip
    console.print_table(
        "What becomes uncertain, by the probability below which a face does",
        ("uncertain below", "uncertain", "the rest right", "balanced accuracy of the rest"),
        [
            (
                f"{row['below']:g}{' (configured)' if row['configured'] else ''}", percent(row["uncertain_share"]),
                percent(row["accuracy"]), percent(row["balanced_accuracy"]),
            )
            for row in values["uncertain"]
        ],
    )  # fmt: skip


def _print_detectors(folder: Path, values: dict[str, Any]) -> None:
    from workers.training.evaluate import COMBINED_BINS, SIZE_BINS

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


def _print_line(words: str) -> None:
    console.out.print(words, highlight=False)


def _decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
