"""`maskwatch evaluate`: the commands and their options.

Each command calls a file of its own, imported when it runs, because it needs models and decoders, which take seconds to
load and may not be installed.
"""

from __future__ import annotations

from pathlib import Path

import click

from common.cli.parts import console
from common.cli.parts.options import runtime_options
from common.domain import MaskwatchError

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

#: Valid sizes in px to scale faces down to.
AT_PX = click.IntRange(8, 160)


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
    """Run the whole pipeline on labelled scenes: which faces it finds, and how often it classifies them right.

    FOLDER holds images/ and annotations/ (Pascal VOC). A face is found if a detection overlaps its labelled box by half
    (IoU 0.5). Sizes are the longer side of the labelled box. Balanced accuracy is the mean of both classes' recalls
    among found faces, by the larger probability. Calibration error is how far the confidence is from the share that is
    right.

    With --out also: reliability.png, confusion.png, precision_recall.png, and the worst mistakes: mislabelled.png,
    missed.png, unlabelled.png (detections where no face is labelled).

    \b
    Examples:
      maskwatch evaluate scenes test-scenes/
      maskwatch evaluate scenes test-scenes/ --detector haar --out figures/ --json
    """
    from workers.cli import evaluate_scenes  # loads models and decoders

    evaluate_scenes.run(folder, detector, classifier, out, as_json=as_json)


@evaluate.command()
@FOLDER
@CLASSIFIER
@click.option(
    "--held-out", is_flag=True, help="Only faces that were held out when the shipped classifiers were trained."
)
@click.option(
    "--only", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="Only the faces that this file names, one per line, e.g. held_out.txt of a training.",
)  # fmt: skip
@click.option("--at", "at_px", type=AT_PX, metavar="PX", help="Scale larger faces down to PX pixels first.")
@click.option(
    "--keep-confusion", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Also store the confusion matrix in FILE for `maskwatch pipelines list`, as in common/models/figures.json.",
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
    """Run the classifier alone on labelled faces: precision, recall and F1 as scikit-learn computes them.

    FOLDER holds class folders (with_mask/, without_mask/, perhaps mask_weared_incorrect/), or images/ and annotations/,
    whose faces are then cut by their labels. Sizes are the longer side of the face, as the classifier sees it: --at 20
    measures it on faces as small as those of distant cameras. Also prints masks worn wrongly, which should be called
    without_mask; calibration; and the share of `uncertain` faces by threshold.

    With --out also: reliability.png, confusion.png and mislabelled.png, the surest mistakes.

    \b
    Examples:
      maskwatch evaluate faces test-faces/
      maskwatch evaluate faces faces/ --only trained/compact-field/held_out.txt
      maskwatch evaluate faces test-faces/ --at 20 --out figures/ --json
    """
    if held_out and only:
        raise MaskwatchError("--held-out and --only exclude each other")
    if keep_confusion is not None and at_px is not None:
        raise MaskwatchError("--keep-confusion stores figures of faces at their own size: leave out --at")
    from workers.cli import evaluate_faces  # loads models and decoders

    evaluate_faces.run(
        folder, classifier, held_out=held_out, only=only, at_px=at_px, keep_confusion=keep_confusion, out=out,
        as_json=as_json,
    )  # fmt: skip


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
    are enlarged as configured (MASKWATCH_PIPELINE__ENLARGE_BELOW_PX), except for fdet-*, which run as in that package.
    Detectors whose weights are not on this machine are listed with the reason.

    With --out also: precision_recall.png, with a dot at each detector's own threshold.

    \b
    Examples:
      maskwatch evaluate detectors test-scenes/
      maskwatch evaluate detectors test-scenes/ --only centerface --only haar --out figures/
    """
    from workers.cli import evaluate_detectors  # loads models and decoders

    evaluate_detectors.run(folder, only, out, as_json=as_json)
