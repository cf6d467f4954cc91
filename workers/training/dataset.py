"""Labelled faces for training and measuring: reads class folders and Pascal VOC scenes into memory, keeps
look-alikes together, splits.

It leaves what happens to a face before the network sees it to `augment` and `workers.classification._ops`.
"""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import MaskStatus, MaskwatchError, PermanentJobError
from workers.classification import _ops
from workers.decoding import decode_image

#: Class order of every network: the classes sorted, as in the notebook.
CLASS_NAMES = (MaskStatus.WITH_MASK.value, MaskStatus.WITHOUT_MASK.value)

#: Names that labels go by → class index. A mask worn wrongly protects nobody: it counts as without.
WORN_WRONGLY = "mask_weared_incorrect"
CLASS_OF_LABEL = {"with_mask": 0, "without_mask": 1, WORN_WRONGLY: 1}

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}

#: Where a face of a class folder lies in its picture: such crops are cut with about this margin on every side.
FOLDER_MARGIN = 0.12

#: A larger picture is left out, named.
MAX_PIXELS = 100_000_000

#: How much of its surroundings a face of a scene keeps in memory, as a multiple of its box. Widening takes 1.5,
#: jitter and turning a little more.
SCENE_CONTEXT = 2.4

#: Faces keep at most this many pixels on the longer side of their box: no network here sees more.
KEEP_FACE_PX = 160

#: Labelled boxes below this are guesses of whoever labelled them.
SMALLEST_FACE_PX = 8

#: Upper halves of two faces that correlate above this are the same photo, as a rule: measured on faces whose
#: pairs are known (masks pasted on photos); most true pairs lie above, and hardly any strangers.
LOOKALIKE_CORRELATION = 0.93

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A face in a picture as somebody labelled it. Box: xyxy pixels, inside the picture."""

    box: Box
    label: int
    worn_wrongly: bool = False

    @property
    def size_px(self) -> float:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no single truth when compared
class FaceSample:
    """One labelled face in memory.

    pixels: uint8 RGB (h, w, 3), the face with what is kept of its surroundings; box: xyxy in these pixels.
    size_px: the longer side of the box in the original picture. Samples of one group stay on one side of a split.
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
    """What was read, and the files that could not be: (name, reason)."""

    samples: list[FaceSample] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Faces per class."""
        counted = Counter(sample.label for sample in self.samples)
        return {name: counted[index] for index, name in enumerate(CLASS_NAMES)}

    def sources(self) -> dict[str, int]:
        """Faces per source, by name."""
        return dict(sorted(Counter(sample.source for sample in self.samples).items()))


def load(folders: Iterable[Path]) -> FaceSet:
    """Reads class folders and scene folders into memory and groups look-alikes.

    A scene folder holds images/ and annotations/ (Pascal VOC). A class folder holds with_mask/, without_mask/ and
    perhaps mask_weared_incorrect/; a manifest.csv beside them (columns file, source) names each file's source.
    Raises `MaskwatchError` for a folder that is neither, an unknown class, and a class without a single face.
    """
    faces = FaceSet()
    for folder in folders:
        if not folder.is_dir():
            raise MaskwatchError(f"{folder} is no folder")
        before = len(faces.samples)
        if is_scene_folder(folder):
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


def is_scene_folder(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "annotations").is_dir()


def _load_class_folder(folder: Path, faces: FaceSet) -> None:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise MaskwatchError(
            f"{folder} holds neither class folders ({', '.join(CLASS_OF_LABEL)}) nor images/ with annotations/"
        )
    for class_folder in classes:
        if class_folder.name not in CLASS_OF_LABEL:
            raise MaskwatchError(
                f"unknown class folder {class_folder.name!r} in {folder}; known: {', '.join(CLASS_OF_LABEL)}"
            )
    sources = _manifest_sources(folder / "manifest.csv")
    for class_folder in classes:
        for path in _images(class_folder):
            name = f"{class_folder.name}/{path.name}"
            pixels = _read_or_note(path, name, faces)
            if pixels is None:
                continue
            height, width = pixels.shape[:2]
            box = (
                width * FOLDER_MARGIN, height * FOLDER_MARGIN,
                width * (1 - FOLDER_MARGIN), height * (1 - FOLDER_MARGIN),
            )  # fmt: skip
            sample = FaceSample(
                pixels=pixels,
                box=box,
                label=CLASS_OF_LABEL[class_folder.name],
                size_px=max(box[2] - box[0], box[3] - box[1]),
                from_scene=False,
                source=sources.get(name, folder.name),
                group=f"{folder.name}/{name}",
                name=name,
                worn_wrongly=class_folder.name == WORN_WRONGLY,
            )
            faces.samples.append(_shrunk(sample))


def _load_scenes(folder: Path, faces: FaceSet) -> None:
    for image_path, annotation_path in scene_pairs(folder):
        pixels = _read_or_note(image_path, image_path.name, faces)
        if pixels is None:
            continue
        height, width = pixels.shape[:2]
        for number, labelled in enumerate(read_voc(annotation_path, width, height)):
            if labelled.size_px < SMALLEST_FACE_PX:
                continue
            # The kept pixels are cut as a widened crop would be, so that edges of the picture stay edges.
            wide = _ops.widen_box(labelled.box, width, height, below_px=float("inf"), factor=SCENE_CONTEXT)
            left, top, right, bottom = _ops.pixel_box(wide, width, height)
            x1, y1, x2, y2 = labelled.box
            sample = FaceSample(
                pixels=np.ascontiguousarray(pixels[top:bottom, left:right]),
                box=(x1 - left, y1 - top, x2 - left, y2 - top),
                label=labelled.label,
                size_px=labelled.size_px,
                from_scene=True,
                source=folder.name,
                group=f"{folder.name}/{image_path.name}",
                name=f"{image_path.name}#{number}",
                worn_wrongly=labelled.worn_wrongly,
            )
            faces.samples.append(_shrunk(sample))


def scene_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """(picture, its annotation) of a scene folder, by name.

    Raises `MaskwatchError` where the folder has no pictures or a picture has no annotation.
    """
    if not is_scene_folder(folder):
        raise MaskwatchError(f"{folder} is no scene folder: it needs images/ and annotations/ (Pascal VOC)")
    pairs = [(path, folder / "annotations" / f"{path.stem}.xml") for path in _images(folder / "images")]
    if not pairs:
        raise MaskwatchError(f"{folder / 'images'} holds no picture")
    for image_path, annotation_path in pairs:
        if not annotation_path.is_file():
            raise MaskwatchError(f"{image_path.name} has no annotation {annotation_path}")
    return pairs


def read_voc(path: Path, width: int, height: int) -> list[LabelledBox]:
    """The labelled faces of one Pascal VOC file, boxes clipped to the picture of width × height pixels.

    Corners are taken as edges: a box from xmin 10 to xmax 20 is 10 pixels wide. Boxes outside the picture are
    left out. Raises `MaskwatchError` for a file that is no VOC annotation and for an unknown label.
    """
    labelled = []
    try:
        # Annotations are the user's own files; entities are not resolved beyond what expat allows.
        for entry in ElementTree.parse(path).getroot().iter("object"):
            name = entry.findtext("name", "").strip()
            if name not in CLASS_OF_LABEL:
                raise MaskwatchError(f"unknown label {name!r} in {path}; known: {', '.join(CLASS_OF_LABEL)}")
            corners = [float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            x1, x2 = (min(max(value, 0.0), float(width)) for value in corners[0::2])
            y1, y2 = (min(max(value, 0.0), float(height)) for value in corners[1::2])
            if x2 > x1 and y2 > y1:
                labelled.append(LabelledBox((x1, y1, x2, y2), CLASS_OF_LABEL[name], name == WORN_WRONGLY))
    except (ElementTree.ParseError, ValueError) as error:
        raise MaskwatchError(f"{path} is no Pascal VOC annotation: {error}") from error
    return labelled


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _manifest_sources(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if not {"file", "source"} <= set(reader.fieldnames or ()):
            raise MaskwatchError(f"{path} lacks the columns file and source")
        return {row["file"]: row["source"] for row in reader}


def _read_or_note(path: Path, name: str, faces: FaceSet) -> NDArray[np.uint8] | None:
    try:
        return decode_image(path.read_bytes(), max_pixels=MAX_PIXELS).rgb
    except (PermanentJobError, OSError) as error:
        faces.unreadable.append((name, str(error)))
        return None


def _shrunk(sample: FaceSample) -> FaceSample:
    """The sample with its face at most `KEEP_FACE_PX` on its longer side: memory, and time for every later crop."""
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
    """The samples with one group for all that look alike, beside those that already share one.

    Compares the upper halves, which a mask leaves free: so a photo and its copy with a pasted mask meet.
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


@dataclass(frozen=True, slots=True)
class Split:
    """Who learns, who judges epochs and temperature, and who is kept for the last look. Groups stay whole."""

    training: list[FaceSample]
    validation: list[FaceSample]
    held_out: list[FaceSample]


def split_by_group(samples: Sequence[FaceSample], seed: int) -> Split:
    """About eight tenths, one, and one. Classes and kinds of data are spread alike, groups stay on one side.

    Raises `MaskwatchError` where a side would lack a class.
    """
    rest, held_out = _fold(samples, 10, seed)
    training, validation = _fold(rest, 9, seed)
    return Split(training, validation, held_out)


def split_as_notebook(samples: Sequence[FaceSample], seed: int) -> Split:
    """Nine tenths and one, stratified by class alone, which then judges and is looked at last. Raises as above."""
    from sklearn.model_selection import train_test_split

    labels = [sample.label for sample in samples]
    if min(Counter(labels).values(), default=0) < 2 or len(samples) < 20:
        raise MaskwatchError(f"{len(samples)} faces are too few to hold out one in ten of each class")
    training, held_out = train_test_split(list(samples), test_size=0.1, stratify=labels, random_state=seed)
    return Split(training, held_out, held_out)


def limited(samples: Sequence[FaceSample], limit: int, seed: int) -> list[FaceSample]:
    """At most `limit` of the faces, chosen at random, the classes in the proportions they have."""
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
