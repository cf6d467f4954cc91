"""The reference notebook's video loop, written from its description, and its cost: what Maskwatch is timed against.

A frame at a time: OpenCV reads it, fdet finds its faces, with gradients on as it has them; each face is cut out,
resized by TensorFlow and given to Keras's `predict` alone; OpenCV draws the frame and writes it. Where it differs from
the notebook, and why:

- The classifier is the shipped Xception, so that labels can be compared with ours. Workers run it as the mean over a
  crop and its mirror image, and so does this loop, unless `mirrored=False`: the notebook's own had no mirror.
- The detector's small backbone is the default, for the large one's weights can't be had everywhere.
- fdet's `batched_nms` is ours instead of torchvision's, see `workers.detection.fdet_package`.

What it gets wrong is kept: see `NotebookLoop.frame` and `draw`.

    python -m benchmarks.notebook_baseline VIDEO... [--weights FOLDER] [--limit 100] [--draw-to FOLDER] [--json]
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import MaskStatus, MaskwatchError
from common.models.pipeline import spec_of

Backbone = Literal["mobilenet", "resnet50"]
Pixels = NDArray[np.uint8]

#: What the manifest calls fdet's detectors, by backbone.
DETECTORS: dict[Backbone, str] = {"mobilenet": "fdet-retinaface-mobilenet", "resnet50": "fdet-retinaface"}
CLASSIFIER = "xception"
#: fdet's own default.
THRESHOLD = 0.8
#: Crops are resized to this, whatever their aspect.
SIDE = 128
#: The order of the network's outputs: the classes sorted.
CLASSES = (MaskStatus.WITH_MASK, MaskStatus.WITHOUT_MASK)
#: BGR, and the words beside the box.
COLOURS = {MaskStatus.WITH_MASK: (0, 255, 0), MaskStatus.WITHOUT_MASK: (0, 0, 255)}
WORDS = {MaskStatus.WITH_MASK: "With mask", MaskStatus.WITHOUT_MASK: "Without mask"}
#: A box with a side below this is drawn half as large again.
SMALL_PX = 90
#: How OpenCV writes each kind of file.
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}


@dataclass(frozen=True, slots=True)
class NotebookFace:
    """A face as the notebook has it. box_xyxy: whole pixels of the frame, and it may reach out of it."""

    box_xyxy: tuple[int, int, int, int]
    score: float
    label: MaskStatus
    p_with_mask: float


@dataclass(frozen=True, slots=True)
class NotebookRun:
    """What a video took. seconds: of everything, reading, drawing and writing included; detecting and classifying are
    parts of it. skipped: detections whose crop was empty, which no frame counts among its faces."""

    frames: int
    seconds: float
    faces_per_frame: tuple[int, ...]
    detecting_seconds: float
    classifying_seconds: float
    skipped: int


class NotebookLoop:
    """The models, loaded and warm, and what the notebook does to one frame with them. One thread at a time.

    mirrored: whether each crop is also seen in the mirror, as Maskwatch's workers do. threads: torch's, as many as
    cores where none are named; TensorFlow's are its own choice, as in the notebook.
    """

    def __init__(self, backbone: Backbone = "mobilenet", *, mirrored: bool = True, threads: int | None = None) -> None:
        """Raises `MaskwatchError` where weights, torch, fdet or TensorFlow aren't there."""
        self._detector = load_fdet(backbone, threads)
        self._network, self._tf = load_keras(mirrored=mirrored)
        #: Seconds so far, and detections so far whose crop was empty.
        self.detecting_seconds = 0.0
        self.classifying_seconds = 0.0
        self.skipped = 0
        # TensorFlow and torch prepare at the first call what they use ever after.
        self._detector.detect(np.zeros((480, 640, 3), np.uint8))
        self._predict(np.zeros((16, 16, 3), np.uint8))

    def frame(self, image_rgb: Pixels) -> list[NotebookFace]:
        """The faces of one RGB frame, uint8 (height, width, 3), in fdet's order: best score first.

        A box is cut out with a plain slice, as it comes. One that begins left of the frame or above it has a negative
        start, which counts from the other end: the crop is empty, as a rule, and the face is lost.
        """
        started = time.perf_counter()
        found = self._detector.detect(image_rgb)
        detected = time.perf_counter()
        faces = []
        for face in found:
            x, y, w, h = face["box"]
            crop = image_rgb[y : y + h, x : x + w]
            if crop.shape[0] == 0 or crop.shape[1] == 0:
                self.skipped += 1
                continue
            p = self._predict(crop)
            label = CLASSES[int(np.argmax(p))]
            faces.append(NotebookFace((x, y, x + w, y + h), face["confidence"], label, float(p[0])))
        self.detecting_seconds += detected - started
        self.classifying_seconds += time.perf_counter() - detected
        return faces

    def _predict(self, crop_rgb: Pixels) -> NDArray[np.float32]:
        """The probabilities (2,) of one crop."""
        resized = self._tf.image.resize(crop_rgb, (SIDE, SIDE))
        scaled = resized / 127.5 - 1
        probabilities: NDArray[np.float32] = self._network.predict(scaled[None], verbose=0)[0]
        return probabilities


def load_fdet(backbone: Backbone, threads: int | None = None) -> Any:
    """fdet's own RetinaFace, with its defaults. Errors as `load_fdet_retinaface`."""
    from common.machine import usable_cores
    from common.models.manifest import ModelKind, pinned_model
    from common.settings import PipelineSettings
    from workers.detection.fdet_package import load_fdet_retinaface
    from workers.inference import Engine, Runtime
    from workers.weights.files import cache_folder

    _, detector = pinned_model(DETECTORS[backbone], ModelKind.DETECTOR, cache_folder())
    pinned = f"{detector.name}@{detector.sha256}"
    spec = spec_of(PipelineSettings(detector=pinned, detector_threshold=THRESHOLD), cache_folder())
    # What is behind our protocol: this clips boxes and switches gradients off, which the notebook doesn't.
    return load_fdet_retinaface(spec, Runtime(Engine.NATIVE, threads=threads or usable_cores()))._detector


def load_keras(*, mirrored: bool) -> tuple[Any, Any]:
    """The shipped Xception as a Keras model, and TensorFlow. Errors as `workers.weights.files.read_files`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise MaskwatchError("the notebook's way needs TensorFlow: pip install 'maskwatch[native]'") from error

    from common.models.manifest import MODELS
    from workers.classification.keras_session import to_keras
    from workers.weights.files import read_model

    network = to_keras(read_model(MODELS[CLASSIFIER].ref), CLASSIFIER)
    if not mirrored and network.name.endswith("_mirrored"):
        network = network.get_layer(network.name.removesuffix("_mirrored"))
    return network, tf


def run_video(path: Path, loop: NotebookLoop, limit: int | None = None, draw_to: Path | None = None) -> NotebookRun:
    """The loop over a video, or its first `limit` frames. draw_to: the .mp4 or .avi for drawn frames; None: none drawn.

    Raises `MaskwatchError` where OpenCV can't read the one or write the other.
    """
    counts = []
    detecting, classifying, skipped = loop.detecting_seconds, loop.classifying_seconds, loop.skipped
    started = time.perf_counter()
    with opened(path) as capture, writer_for(draw_to, capture) if draw_to else nullcontext() as writer:
        for frame_bgr in frames_of(capture, limit):
            faces = loop.frame(as_rgb(frame_bgr))
            if writer is not None:
                draw(frame_bgr, faces)
                writer.write(frame_bgr)
            counts.append(len(faces))
    return NotebookRun(
        frames=len(counts),
        seconds=time.perf_counter() - started,
        faces_per_frame=tuple(counts),
        detecting_seconds=loop.detecting_seconds - detecting,
        classifying_seconds=loop.classifying_seconds - classifying,
        skipped=loop.skipped - skipped,
    )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A video for OpenCV to read."""
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise MaskwatchError(f"OpenCV can't read {path}: it isn't there, or is no video")
        yield capture
    finally:
        capture.release()


@contextmanager
def writer_for(path: Path, capture: Any) -> Iterator[Any]:
    """A video for OpenCV to write, of the size and speed of another one."""
    if path.suffix not in CODECS:
        raise MaskwatchError(f"{path} can't be written; valid: a name that ends with {' or '.join(CODECS)}")
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix])
    writer = cv2.VideoWriter(str(path), codec, capture.get(cv2.CAP_PROP_FPS) or 25.0, size)
    try:
        if not writer.isOpened():
            raise MaskwatchError(f"OpenCV can't write {path}")
        yield writer
    finally:
        writer.release()


def frames_of(capture: Any, limit: int | None = None) -> Iterator[Pixels]:
    """The frames of an opened video as OpenCV gives them, BGR, the first `limit` of them."""
    count = 0
    while limit is None or count < limit:
        there, frame_bgr = capture.read()
        if not there:
            return
        yield frame_bgr
        count += 1


def as_rgb(frame_bgr: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB), np.uint8)


def draw(frame_bgr: Pixels, faces: Sequence[NotebookFace]) -> None:
    """Draws boxes and words into a BGR frame.

    Boxes of small faces grow to the right and down: too late to help the classifier, for the crop has been taken.
    """
    for face in faces:
        x1, y1, x2, y2 = face.box_xyxy
        w, h = x2 - x1, y2 - y1
        if w < SMALL_PX or h < SMALL_PX:
            w, h = int(1.5 * w), int(1.5 * h)
        colour = COLOURS[face.label]
        cv2.rectangle(frame_bgr, (x1, y1), (x1 + w, y1 + h), colour, 1)
        cv2.putText(frame_bgr, WORDS[face.label], (x1, y1 - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1)


@contextmanager
def models_from(folder: Path | None) -> Iterator[None]:
    """Inside, the cache of models is a temporary one with the weights of a folder; None: the configured one, as it is.

    Errors as `workers.weights.download.import_files`.
    """
    if folder is None:
        yield
        return
    from common.settings import get_settings
    from workers.detection.structure import check_fits
    from workers.weights.download import import_files, known_files

    before = os.environ.get("MASKWATCH_MODELS_DIR")
    with tempfile.TemporaryDirectory(prefix="maskwatch-bench-") as cache:
        os.environ["MASKWATCH_MODELS_DIR"] = cache
        get_settings.cache_clear()
        try:
            import_files(known_files(folder), check_fits)
            yield
        finally:
            del os.environ["MASKWATCH_MODELS_DIR"]
            if before is not None:
                os.environ["MASKWATCH_MODELS_DIR"] = before
            get_settings.cache_clear()


def figures(path: Path, run: NotebookRun) -> dict[str, Any]:
    """What a run says, per frame and per face. None where there was none."""
    faces = sum(run.faces_per_frame)
    frames = run.frames or None
    return {
        "video": path.name,
        "frames": run.frames,
        "faces": faces,
        "skipped": run.skipped,
        "seconds": run.seconds,
        "frames_per_s": run.frames / run.seconds,
        "ms_per_frame": frames and 1000 * run.seconds / frames,
        "detecting_ms_per_frame": frames and 1000 * run.detecting_seconds / frames,
        "classifying_ms_per_face": 1000 * run.classifying_seconds / faces if faces else None,
    }


def line(row: dict[str, Any]) -> str:
    if not row["frames"]:
        return f"{row['video']}: no frame"
    each = row["classifying_ms_per_face"]
    return (
        f"{row['video']}: {row['frames']} frames with {row['faces']} faces in {row['seconds']:.1f} s, "
        f"{row['frames_per_s']:.2f} frames/s; detecting {row['detecting_ms_per_frame']:.0f} ms a frame, "
        + ("nothing to classify" if each is None else f"classifying {each:.0f} ms a face")
        + (f"; {row['skipped']} faces lost at the edge" if row["skipped"] else "")
    )


@click.command()
@click.argument("videos", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--backbone", type=click.Choice(list(DETECTORS)), default="mobilenet", show_default=True)
@click.option("--mirrored/--single", default=True, show_default=True, help="See each crop in the mirror, too, or not.")
@click.option(
    "--weights", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the detector's weights; unset: what `maskwatch models` has.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Frames of each video.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the detector; unset: as many as cores.")
@click.option(
    "--draw-to", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder for the drawn videos; unset: nothing is drawn or written.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True)
def main(
    videos: tuple[Path, ...], backbone: Backbone, mirrored: bool, weights: Path | None, limit: int | None,
    threads: int | None, draw_to: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Time the notebook's loop over videos."""
    rows = []
    try:
        with models_from(weights):
            loop = NotebookLoop(backbone, mirrored=mirrored, threads=threads)
            for video in videos:
                drawn = None if draw_to is None else draw_to / f"{video.stem}.mp4"
                rows.append(figures(video, run_video(video, loop, limit, drawn)))
    except MaskwatchError as error:
        raise click.ClickException(str(error)) from error
    print(json.dumps(rows, indent=2) if as_json else "\n".join(line(row) for row in rows))


if __name__ == "__main__":
    main()
