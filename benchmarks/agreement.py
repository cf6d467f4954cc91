"""Whether the notebook's loop and Maskwatch say the same of the same frames, and which is right more often.

With the notebook's own models and settings (`twin_spec`), Maskwatch finds the same faces and labels them the same, so
timing one against the other is fair. With what it ships, it is compared with the notebook on labelled scenes, by the
rules of `maskwatch evaluate scenes`.

    python -m benchmarks.agreement [VIDEO...] [--scenes FOLDER] [--weights FOLDER] [--every 5] [--limit 40] [--json]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.notebook_baseline import (
    CLASSES,
    CLASSIFIER,
    THRESHOLD,
    Backbone,
    NotebookFace,
    NotebookLoop,
    Pixels,
    as_rgb,
    frames_of,
    models_from,
    opened,
)
from common.domain import Face, MaskStatus, MaskwatchError, PipelineSpec
from common.models.pipeline import spec_of
from common.reporting.tables import percent
from common.sample.ground_truth import match

if TYPE_CHECKING:
    from workers.evaluation.scenes import SceneResults

#: Our own detector with the same weights file as the notebook's, by backbone.
TWINS: dict[Backbone, str] = {"mobilenet": "retinaface-mobilenet", "resnet50": "retinaface-resnet50"}
#: fdet scales larger pictures down to this.
LONGEST_PX = 1000


@dataclass(slots=True)
class Agreement:
    """Faces of the same frames, found and labelled in two ways: both found, and only one did."""

    frames: int = 0
    both: int = 0
    only_notebook: int = 0
    only_maskwatch: int = 0
    same_label: int = 0
    #: Of the faces that both found: how far apart the two put P(with mask), and the edges of the box, in pixels. fdet
    #: cuts corner and sides to whole pixels, and doesn't end a box where the picture ends.
    p_apart: list[float] = field(default_factory=list)
    px_apart: list[float] = field(default_factory=list)

    def add(self, notebook: Sequence[NotebookFace], maskwatch: Sequence[Face]) -> None:
        """Counts one frame. Pairs are taken greedily, best IoU first, from 0.5 on (`ground_truth.match`)."""
        pairs = list(match([face.box_xyxy for face in notebook], [_box(face) for face in maskwatch]))
        self.frames += 1
        self.both += len(pairs)
        self.only_notebook += len(notebook) - len(pairs)
        self.only_maskwatch += len(maskwatch) - len(pairs)
        for theirs, ours in ((notebook[i], maskwatch[j]) for i, j in pairs):
            self.same_label += theirs.label is label_of(ours)
            self.p_apart.append(abs(theirs.p_with_mask - ours.p_with_mask))
            self.px_apart.append(max(abs(a - b) for a, b in zip(theirs.box_xyxy, _box(ours), strict=True)))

    @property
    def faces(self) -> int:
        """Of both ways together; one that both found counts once."""
        return self.both + self.only_notebook + self.only_maskwatch

    def figures(self) -> dict[str, Any]:
        """Ready for JSON; None where there was nothing to be counted."""
        return {
            "frames": self.frames,
            "faces": self.faces,
            "both": self.both,
            "only_notebook": self.only_notebook,
            "only_maskwatch": self.only_maskwatch,
            "same_faces": self.both / self.faces if self.faces else None,
            "same_labels": self.same_label / self.both if self.both else None,
            "p_apart_median": float(np.median(self.p_apart)) if self.both else None,
            "p_apart_largest": max(self.p_apart, default=None),
            "px_apart_median": float(np.median(self.px_apart)) if self.both else None,
            "px_apart_largest": max(self.px_apart, default=None),
        }


def label_of(face: Face) -> MaskStatus:
    """The larger probability's class, whether Maskwatch is sure enough of it or not; a tie is with, as `argmax` has."""
    return CLASSES[0] if face.p_with_mask >= face.p_without_mask else CLASSES[1]


def _box(face: Face) -> tuple[float, float, float, float]:
    return face.x1, face.y1, face.x2, face.y2


def as_faces(notebook: Iterable[NotebookFace], image_rgb: Pixels) -> list[Face]:
    """The notebook's faces in Maskwatch's words: boxes end at the picture's edge, and nothing is uncertain."""
    from workers.classification.verdict import face_of

    height, width = image_rgb.shape[:2]
    faces = []
    for face in notebook:
        x1, y1, x2, y2 = face.box_xyxy
        box = (float(max(0, x1)), float(max(0, y1)), float(min(width, x2)), float(min(height, y2)))
        if box[2] > box[0] and box[3] > box[1]:
            faces.append(face_of(box, face.score, face.p_with_mask, uncertain_below=0.5))
    return faces


def twin_spec(backbone: Backbone = "mobilenet") -> PipelineSpec:
    """The pipeline with the notebook's models and settings: our own RetinaFace on pictures as they are, crops as the
    boxes are, nothing uncertain. Raises `MaskwatchError` where no hash of the detector is known."""
    from common.settings import PipelineSettings, get_settings

    return spec_of(
        PipelineSettings(
            detector=TWINS[backbone],
            classifier=CLASSIFIER,
            detector_threshold=THRESHOLD,
            enlarge_below_px=0,
            shrink_above_px=LONGEST_PX,
            widen_below_px=0,
            uncertain_below=0.5,
        ),
        get_settings().models_dir,
    )


def agreement_on(
    frames_rgb: Iterable[Pixels], loop: NotebookLoop, analyze: Callable[[Pixels], Sequence[Face]]
) -> Agreement:
    """Both ways over the same RGB frames."""
    agreement = Agreement()
    for frame_rgb in frames_rgb:
        agreement.add(loop.frame(frame_rgb), analyze(frame_rgb))
    return agreement


def frames_rgb_of(path: Path, every: int, limit: int | None) -> Iterator[Pixels]:
    """One frame of `every` of a video, RGB, the first `limit` of those."""
    with opened(path) as capture:
        for frame_bgr in islice(frames_of(capture), 0, None if limit is None else limit * every, every):
            yield as_rgb(frame_bgr)


def notebook_on_scenes(
    folder: Path, loop: NotebookLoop, also: Callable[[Pixels, list[NotebookFace]], None] = lambda image, faces: None
) -> SceneResults:
    """The notebook's way on labelled scenes, counted as `maskwatch evaluate scenes` counts.

    also: is given each picture and the notebook's faces in it. Errors as `evaluate_scenes`.
    """
    from common.settings import get_settings
    from workers.evaluation.scenes import evaluate_scenes

    def analyze(image_rgb: Pixels) -> list[Face]:
        found = loop.frame(image_rgb)
        also(image_rgb, found)
        return as_faces(found, image_rgb)

    return evaluate_scenes(folder, analyze, get_settings().worker.max_image_pixels)


def headline(results: SceneResults, uncertain_below: float) -> dict[str, Any]:
    """The figures of `SceneResults.summary` that decide. Judged: of faces that are large enough to judge labels by.

    Balanced accuracy is that of the faces that were found: who finds more has harder ones among them.
    """
    summary = results.summary(uncertain_below)
    return {
        **{name: summary[name] for name in ("images", "labelled_faces", "matched", "recall", "precision")},
        **{f"judged_{name}": summary["judged"][name] for name in ("labelled", "matched", "recall")},
        "judged_balanced_accuracy": summary["judged"]["balanced_accuracy"],
        "judged_confusion": summary["judged"]["confusion"],
    }


def on_scenes(folder: Path, loop: NotebookLoop, twin: PipelineSpec, shipped: PipelineSpec) -> dict[str, Any]:
    """Notebook, its twin and the shipped defaults on labelled scenes; and how far the first two agree there."""
    from common.machine import usable_cores
    from common.settings import get_settings
    from workers.analysis.load import load_analyzer
    from workers.evaluation.scenes import evaluate_scenes
    from workers.inference import Runtime

    runtime = Runtime(threads=usable_cores())
    same, ours = load_analyzer(twin, runtime), load_analyzer(shipped, runtime)
    agreement = Agreement()
    notebook = notebook_on_scenes(folder, loop, lambda image, faces: agreement.add(faces, same.analyze(image)))
    max_pixels = get_settings().worker.max_image_pixels
    defaults = evaluate_scenes(folder, ours.analyze, max_pixels)
    return {
        "agreement": agreement.figures(),
        "notebook": headline(notebook, 0.5),
        "twin": headline(evaluate_scenes(folder, same.analyze, max_pixels), twin.uncertain_below),
        "shipped": headline(defaults, shipped.uncertain_below),
        "found_by_both": on_the_same_faces(notebook, defaults),
    }


def on_the_same_faces(notebook: SceneResults, shipped: SceneResults) -> dict[str, Any]:
    """The balanced accuracy of both on the faces, large enough to judge, that both have found."""
    from workers.evaluation.scenes import SceneResults

    pairs = zip(notebook.outcomes, shipped.outcomes, strict=True)
    both = [pair for pair in pairs if pair[0].face is not None and pair[1].face is not None]
    judged = [SceneResults(outcomes=list(side)).summary(0.5)["judged"] for side in zip(*both, strict=True)]
    return {
        "faces": judged[0]["labelled"],
        **{n: j["balanced_accuracy"] for n, j in zip(("notebook", "shipped"), judged, strict=True)},
    }


def on_videos(videos: Sequence[Path], loop: NotebookLoop, twin: PipelineSpec, every: int, limit: int | None) -> Any:
    """How far notebook and twin agree on frames of each video, by its name."""
    from common.machine import usable_cores
    from workers.analysis.load import load_analyzer
    from workers.inference import Runtime

    analyzer = load_analyzer(twin, Runtime(threads=usable_cores()))
    return {
        path.name: agreement_on(frames_rgb_of(path, every, limit), loop, analyzer.analyze).figures() for path in videos
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = []
    scenes = result["scenes"]
    for name, row in {**result["videos"], **({"scenes": scenes["agreement"]} if scenes else {})}.items():
        text.append(
            f"{name}: {row['frames']} frames, {row['faces']} faces, found by both {percent(row['same_faces'])} "
            f"(only by the notebook {row['only_notebook']}, only by Maskwatch {row['only_maskwatch']})"
        )
        if row["both"]:
            text.append(
                f"  of those labelled the same {percent(row['same_labels'])}; P(with mask) at most "
                f"{row['p_apart_largest']:.3f} apart, half of them under {row['p_apart_median']:.4f}; "
                f"edges at most {row['px_apart_largest']:.1f} px, half of them under {row['px_apart_median']:.1f}"
            )
    for name in ("notebook", "twin", "shipped") if scenes else ():
        row = scenes[name]
        text.append(
            f"{name}: {row['matched']} of {row['labelled_faces']} labelled faces found ({percent(row['recall'])}), "
            f"precision {percent(row['precision'])}; from 24 px on {percent(row['judged_recall'])}, "
            f"balanced accuracy {percent(row['judged_balanced_accuracy'])}"
        )
    if scenes:
        both = scenes["found_by_both"]
        text.append(
            f"on the {both['faces']} faces from 24 px on that notebook and defaults both found: balanced accuracy "
            f"{percent(both['notebook'])} and {percent(both['shipped'])}"
        )
    return [*text, f"{result['skipped']} faces lost by the notebook at the picture's edge: empty crops"]


@click.command()
@click.argument("videos", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--scenes", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Labelled scenes.")
@click.option(
    "--weights", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the detector's weights; unset: what `maskwatch models` has.",
)  # fmt: skip
@click.option("--backbone", type=click.Choice(list(TWINS)), default="mobilenet", show_default=True)
@click.option("--every", type=click.IntRange(min=1), default=5, show_default=True, help="Take one frame of so many.")
@click.option("--limit", type=click.IntRange(min=1), help="Frames taken of each video.")
@click.option("--json", "as_json", is_flag=True)
def main(
    videos: tuple[Path, ...], scenes: Path | None, weights: Path | None, backbone: Backbone, every: int,
    limit: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare the notebook's loop with Maskwatch, face by face and on labelled scenes."""
    from common.settings import PipelineSettings, get_settings

    if not videos and scenes is None:
        raise click.UsageError("name videos, or --scenes, or both")
    try:
        with models_from(weights):
            loop, twin = NotebookLoop(backbone), twin_spec(backbone)
            shipped = spec_of(PipelineSettings(), get_settings().models_dir)
            result = {
                "videos": on_videos(videos, loop, twin, every, limit),
                "scenes": None if scenes is None else on_scenes(scenes, loop, twin, shipped),
                "skipped": loop.skipped,
            }
    except MaskwatchError as error:
        raise click.ClickException(str(error)) from error
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


if __name__ == "__main__":
    main()
