"""Labelled faces for training and measuring: reads class folders, manifests and scenes into memory, groups
look-alikes, and splits them.

Reading annotations is left to `annotations`, augmenting and cropping to `augment` and `workers.classification._ops`.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, PermanentJobError
from workers.classification import _ops
from workers.datasets.annotations import (  # fmt: skip
    CLASS_NAMES,
    CLASS_OF_LABEL,
    WORN_WRONGLY,
    Box,
    LabelledBox,
    LeftOut,
    class_of,
    images_in,
    is_scene_folder,
    read_boxes,
    read_text,
    scene_pairs,
)
from workers.media.images import decode_image

#: Margin of an image of a class folder around its face, on every side, as a fraction of the image.
FOLDER_MARGIN = 0.12

#: How many images are in memory at once while they are read.
PREFETCHED = 64

#: A larger image is left out, and reported.
MAX_PIXELS = 100_000_000

#: How much of its surroundings a face of a scene keeps in memory, as a multiple of its box. Widening takes 1.5,
#: jitter and turning a little more.
SCENE_CONTEXT = 2.4

#: Faces keep at most this many pixels on the longer side of their box: no network here sees more.
KEEP_FACE_PX = 160

#: Labels of smaller boxes are guesses.
SMALLEST_FACE_PX = 8

#: If the upper halves of two faces correlate above this, they are usually the same photo. Measured on known pairs
#: (masks pasted on photos): most true pairs lie above, and hardly any other pair.
LOOKALIKE_CORRELATION = 0.93


@dataclass(frozen=True, slots=True, eq=False)  # comparing arrays gives no single bool
class FaceSample:
    """One labelled face in memory.

    pixels: uint8 RGB (h, w, 3), the face with some of its surroundings; box: xyxy in these pixels.
    size_px: the longer side of the box in the original image. Samples of one group stay on one side of a split.
    """

    pixels: NDArray[np.uint8]
    box: Box
    label: int
    size_px: float
    from_scene: bool
    source: str
    group: str
    name: str
    worn_wrongly: bool = False


@dataclass(slots=True)
class FaceSet:
    """The samples that were read, and the files and boxes that could not be used: (name, reason)."""

    samples: list[FaceSample] = field(default_factory=list)
    unreadable: LeftOut = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Faces per class."""
        counted = Counter(sample.label for sample in self.samples)
        return {name: counted[index] for index, name in enumerate(CLASS_NAMES)}

    def sources(self) -> dict[str, int]:
        """Faces per source, by name."""
        return dict(sorted(Counter(sample.source for sample in self.samples).items()))


def load(folders: Iterable[Path]) -> FaceSet:
    """Reads class folders, scene folders and manifests into memory and groups look-alikes.

    A scene folder holds images/ and annotations/ (Pascal VOC) or labels/ (YOLO). A class folder holds with_mask/,
    without_mask/ and perhaps mask_weared_incorrect/; a manifest.csv beside them (columns file, source) names each
    file's source. A manifest (a .csv of its own) has the columns file, relative to it, and label; perhaps source, group
    (faces of one person or photo, which stay on one side of a split), and x1, y1, x2, y2 in pixels of the picture.
    Raises `MaskwatchError` for a folder of another kind, an unknown label, and a class without a face.
    """
    faces = FaceSet()
    for folder in folders:
        before = len(faces.samples)
        if folder.is_file() and folder.suffix.lower() == ".csv":
            _load_manifest(folder, faces)
        elif not folder.is_dir():
            raise MaskwatchError(f"{folder} is neither a folder nor a CSV manifest")
        elif is_scene_folder(folder):
            _load_scenes(folder, faces)
        else:
            _load_class_folder(folder, faces)
        if len(faces.samples) == before:
            raise MaskwatchError(f"{folder} holds no readable face{_unreadable_note(faces.unreadable)}")
    for name, count in faces.counts().items():
        if count == 0:
            raise MaskwatchError(f"no face of class {name} in the data; a classifier needs both classes")
    faces.samples = group_lookalikes(faces.samples)
    return faces


def _unreadable_note(unreadable: Sequence[tuple[str, str]]) -> str:
    if not unreadable:
        return ""
    name, reason = unreadable[0]
    return f": {len(unreadable)} files unreadable, the first is {name} ({reason})"


def _load_class_folder(folder: Path, faces: FaceSet) -> None:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise MaskwatchError(
            f"{folder} holds neither class folders ({', '.join(CLASS_OF_LABEL)}) "
            "nor images/ with annotations/ or labels/"
        )
    for class_folder in classes:
        if class_folder.name not in CLASS_OF_LABEL:
            raise MaskwatchError(
                f"unknown class folder {class_folder.name!r} in {folder}; known: {', '.join(CLASS_OF_LABEL)}"
            )
    sources = _manifest_sources(folder / "manifest.csv")
    for class_folder in classes:
        named = partial(_named_in, class_folder.name)
        for path, pixels in _read_in_parallel(images_in(class_folder), faces, named):
            name = named(path)
            faces.samples.append(
                _folder_sample(pixels, class_folder.name, name, sources.get(name, folder.name), f"{folder.name}/{name}")
            )


def _named_in(label: str, path: Path) -> str:
    return f"{label}/{path.name}"


def _folder_sample(pixels: NDArray[np.uint8], label: str, name: str, source: str, group: str) -> FaceSample:
    """The sample of an image that is one face with a margin."""
    height, width = pixels.shape[:2]
    box = (
        width * FOLDER_MARGIN, height * FOLDER_MARGIN,
        width * (1 - FOLDER_MARGIN), height * (1 - FOLDER_MARGIN),
    )  # fmt: skip
    sample = FaceSample(
        pixels=pixels,
        box=box,
        label=CLASS_OF_LABEL[label],
        size_px=max(box[2] - box[0], box[3] - box[1]),
        from_scene=False,
        source=source,
        group=group,
        name=name,
        worn_wrongly=label == WORN_WRONGLY,
    )
    return _shrunk(sample)


def _load_scenes(folder: Path, faces: FaceSet) -> None:
    annotations = dict(scene_pairs(folder))
    for image_path, pixels in _read_in_parallel(list(annotations), faces, lambda path: path.name):
        height, width = pixels.shape[:2]
        for number, labelled in enumerate(read_boxes(annotations[image_path], width, height, faces.unreadable)):
            if labelled.size_px >= SMALLEST_FACE_PX:
                group = f"{folder.name}/{image_path.name}"
                faces.samples.append(_scene_sample(pixels, labelled, f"{image_path.name}#{number}", folder.name, group))


def _scene_sample(pixels: NDArray[np.uint8], labelled: LabelledBox, name: str, source: str, group: str) -> FaceSample:
    """The sample of a labelled face of a larger image, with its surroundings."""
    height, width = pixels.shape[:2]
    # The kept pixels are cut as a widened crop would be, so that the image's edges stay edges.
    wide = _ops.widen_box(labelled.box, width, height, below_px=float("inf"), factor=SCENE_CONTEXT)
    left, top, right, bottom = _ops.pixel_box(wide, width, height)
    x1, y1, x2, y2 = labelled.box
    sample = FaceSample(
        pixels=np.ascontiguousarray(pixels[top:bottom, left:right]),
        box=(x1 - left, y1 - top, x2 - left, y2 - top),
        label=labelled.label,
        size_px=labelled.size_px,
        from_scene=True,
        source=source,
        group=group,
        name=name,
        worn_wrongly=labelled.worn_wrongly,
    )
    return _shrunk(sample)


def _load_manifest(path: Path, faces: FaceSet) -> None:
    rows = _rows(path, {"file", "label"})
    by_file: dict[Path, list[dict[str, str]]] = {}
    for row in rows:
        class_of(row["label"], path)
        by_file.setdefault(path.parent / row["file"], []).append(row)
    for image_path, pixels in _read_in_parallel(list(by_file), faces, lambda path: path.name):
        height, width = pixels.shape[:2]
        for number, row in enumerate(by_file[image_path]):
            source = row.get("source") or path.stem
            group = f"{path.stem}/{row.get('group') or row['file']}"
            box = _manifest_box(row, path)
            if box is None:
                faces.samples.append(_folder_sample(pixels, row["label"], row["file"], source, group))
                continue
            x1, x2 = (min(max(value, 0.0), float(width)) for value in box[0::2])
            y1, y2 = (min(max(value, 0.0), float(height)) for value in box[1::2])
            if x2 <= x1 or y2 <= y1:
                reason = f"box {box} is outside the picture of {width}×{height}"
                faces.unreadable.append((f"{row['file']}#{number}", reason))
                continue
            labelled = LabelledBox((x1, y1, x2, y2), CLASS_OF_LABEL[row["label"]], row["label"] == WORN_WRONGLY)
            if labelled.size_px >= SMALLEST_FACE_PX:
                faces.samples.append(_scene_sample(pixels, labelled, f"{row['file']}#{number}", source, group))


def _manifest_box(row: dict[str, str], path: Path) -> Box | None:
    """The box of a manifest's row; None if it has no box, and the whole image is the face."""
    corners = [row.get(key) or "" for key in ("x1", "y1", "x2", "y2")]
    if not any(corners):
        return None
    try:
        x1, y1, x2, y2 = map(float, corners)
    except ValueError as error:
        raise MaskwatchError(f"the box {','.join(corners)!r} of {row['file']} in {path} is not x1,y1,x2,y2") from error
    return x1, y1, x2, y2


def _rows(path: Path, needed: set[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            if not needed <= set(reader.fieldnames or ()):
                raise MaskwatchError(f"{path} lacks the columns {' and '.join(sorted(needed))}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MaskwatchError(f"{path} can't be read as CSV in UTF-8: {error}") from error
    for number, row in enumerate(rows, start=2):
        if not all(row[column] for column in needed):
            raise MaskwatchError(f"line {number} of {path} lacks {' or '.join(sorted(needed))}")
    return rows


def _manifest_sources(path: Path) -> dict[str, str]:
    return {row["file"]: row["source"] for row in _rows(path, {"file", "source"})} if path.is_file() else {}


def _read_in_parallel(
    paths: Sequence[Path], faces: FaceSet, name_of: Callable[[Path], str]
) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """(path, RGB) of all images that can be decoded, in order, with prefetch; the others go to `faces.unreadable`."""

    def read(path: Path) -> NDArray[np.uint8] | str:
        try:
            return decode_image(path.read_bytes(), max_pixels=MAX_PIXELS).rgb
        except (PermanentJobError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), PREFETCHED):
            several = paths[start : start + PREFETCHED]
            for path, found in zip(several, pool.map(read, several), strict=True):
                if isinstance(found, str):
                    faces.unreadable.append((name_of(path), found))
                else:
                    yield path, found


def _shrunk(sample: FaceSample) -> FaceSample:
    """The sample with its face at most `KEEP_FACE_PX` on its longer side, which saves memory and later work."""
    x1, y1, x2, y2 = sample.box
    scale = KEEP_FACE_PX / max(x2 - x1, y2 - y1)
    if scale >= 1:
        return sample
    height, width = sample.pixels.shape[:2]
    new_w, new_h = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = np.asarray(cv2.resize(sample.pixels, (new_w, new_h), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    fx, fy = new_w / width, new_h / height
    return replace(sample, pixels=pixels, box=(x1 * fx, y1 * fy, x2 * fx, y2 * fy))


def group_lookalikes(samples: Sequence[FaceSample]) -> list[FaceSample]:
    """The samples, with look-alikes put into one group; samples that share a group already stay together.

    Compares the upper halves, which a mask leaves free, so a photo and its copy with a pasted mask get one group.
    """
    parent = list(range(len(samples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_of_group: dict[str, int] = {}
    for index, sample in enumerate(samples):
        parent[root(index)] = root(first_of_group.setdefault(sample.group, index))
    for left, right in _lookalikes(samples):
        parent[root(left)] = root(right)
    return [replace(sample, group=samples[root(index)].group) for index, sample in enumerate(samples)]


def _lookalikes(samples: Sequence[FaceSample], block: int = 1024) -> Iterator[tuple[int, int]]:
    """Index pairs of faces whose upper halves correlate; a block of rows at a time, to bound memory."""
    halves = np.stack([_upper_half(sample) for sample in samples])
    for start in range(0, len(halves), block):
        correlation = halves[start : start + block] @ halves.T
        rows, columns = np.nonzero(correlation > LOOKALIKE_CORRELATION)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            if start + row < column:
                yield start + row, column


def _upper_half(sample: FaceSample) -> NDArray[np.float32]:
    """float32 (264,): grey values of the upper 11 of 24 rows of the kept crop, centred, of length 1."""
    grey = cv2.cvtColor(sample.pixels, cv2.COLOR_RGB2GRAY)
    values = cv2.resize(grey, (24, 24), interpolation=cv2.INTER_AREA)[:11].astype(np.float32).ravel()
    values -= values.mean()
    return np.asarray(values / (np.linalg.norm(values) + 1e-6), dtype=np.float32)


def named_in(samples: Sequence[FaceSample], path: Path) -> list[FaceSample]:
    """The samples that a file names, one per line. Raises `MaskwatchError` where that leaves a class without a face."""
    names = set(read_text(path).splitlines())
    named = [sample for sample in samples if sample.name in names]
    if len({sample.label for sample in named}) < len(CLASS_NAMES):
        raise MaskwatchError(
            f"{path} names {len(named)} of these faces, but not of both classes; it probably belongs to other data"
        )
    return named


@dataclass(frozen=True, slots=True)
class Split:
    """The faces for training, for choosing the epoch and the temperature, and for the final figures. Groups stay
    whole."""

    training: list[FaceSample]
    validation: list[FaceSample]
    held_out: list[FaceSample]


def split_by_group(samples: Sequence[FaceSample], seed: int) -> Split:
    """About eight tenths, one tenth and one tenth. Each side has the same shares of classes and kinds of data; groups
    stay on one side.

    Raises `MaskwatchError` if a side would lack a class.
    """
    rest, held_out = _fold(samples, 10, seed)
    training, validation = _fold(rest, 9, seed)
    return Split(training, validation, held_out)


def split_as_notebook(samples: Sequence[FaceSample], seed: int) -> Split:
    """Nine tenths and one tenth, stratified by class only; the tenth is used for validation and for the final figures.
    Raises as `split_by_group`."""
    from sklearn.model_selection import train_test_split

    labels = [sample.label for sample in samples]
    if min(Counter(labels).values(), default=0) < 2 or len(samples) < 20:
        raise MaskwatchError(f"{len(samples)} faces are too few to hold out one in ten of each class")
    training, held_out = train_test_split(list(samples), test_size=0.1, stratify=labels, random_state=seed)
    return Split(training, held_out, held_out)


def limited(samples: Sequence[FaceSample], limit: int, seed: int) -> list[FaceSample]:
    """At most `limit` of the faces, chosen at random, with the proportions of the classes kept."""
    if limit >= len(samples):
        return list(samples)
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in range(len(CLASS_NAMES)):
        members = [at for at, sample in enumerate(samples) if sample.label == label]
        count = min(len(members), max(1, round(limit * len(members) / len(samples))))
        chosen += rng.choice(members, count, replace=False).tolist() if members else []
    return [samples[at] for at in sorted(chosen)]


def _fold(samples: Sequence[FaceSample], folds: int, seed: int) -> tuple[list[FaceSample], list[FaceSample]]:
    """(all but one part, one of `folds` parts)."""
    from sklearn.model_selection import StratifiedGroupKFold

    strata = [f"{sample.label}/{sample.from_scene}" for sample in samples]
    groups = [sample.group for sample in samples]
    too_few = MaskwatchError(
        f"{len(samples)} faces in {len(set(groups))} groups of look-alikes are too few to hold out one part in {folds}"
    )
    if min(Counter(sample.label for sample in samples).values(), default=0) < folds or len(set(groups)) < folds:
        raise too_few
    folding = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    rest_at, part_at = next(iter(folding.split(strata, strata, groups)))
    rest, part = [samples[index] for index in rest_at], [samples[index] for index in part_at]
    if any(len({sample.label for sample in side}) < len(CLASS_NAMES) for side in (rest, part)):
        raise too_few
    return rest, part
