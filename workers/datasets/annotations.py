"""Reads the labelled boxes of scenes (Pascal VOC and YOLO annotations), and maps their labels to classes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.domain import MaskStatus, MaskwatchError

#: Class order of every network: the classes sorted, as in the notebook.
CLASS_NAMES = (MaskStatus.WITH_MASK.value, MaskStatus.WITHOUT_MASK.value)

#: Label → class index. A mask worn wrongly protects nobody, so it counts as without.
WORN_WRONGLY = "mask_weared_incorrect"
CLASS_OF_LABEL = {"with_mask": 0, "without_mask": 1, WORN_WRONGLY: 1}

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}

#: Files with the names of YOLO's numbered classes, in the scene folder or beside the labels, one name per line.
YOLO_NAMES = ("classes.txt", "obj.names")

Box = tuple[float, float, float, float]

#: What could not be used: (name, reason).
LeftOut = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """A labelled face of an image. Box: xyxy pixels, inside the image."""

    box: Box
    label: int
    worn_wrongly: bool = False

    @property
    def size_px(self) -> float:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


def class_of(label: str, where: object) -> int:
    """The class index of a label. Raises `MaskwatchError` for an unknown one; `where`: the file that has it."""
    if label not in CLASS_OF_LABEL:
        raise MaskwatchError(f"unknown label {label!r} in {where}; known: {', '.join(CLASS_OF_LABEL)}")
    return CLASS_OF_LABEL[label]


def read_text(path: Path) -> str:
    """The text of a file. Raises `MaskwatchError` if it can't be read or isn't UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MaskwatchError(f"{path} can't be read as text in UTF-8: {error}") from error


def is_scene_folder(folder: Path) -> bool:
    return (folder / "images").is_dir() and _annotation_folder(folder) is not None


def _annotation_folder(folder: Path) -> Path | None:
    """annotations/ with Pascal VOC, else labels/ with YOLO."""
    return next((folder / name for name in ("annotations", "labels") if (folder / name).is_dir()), None)


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def scene_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """(image, its annotation) of a scene folder, by name.

    Raises `MaskwatchError` if the folder has no images or an image has no annotation.
    """
    annotations = _annotation_folder(folder)
    if not is_scene_folder(folder) or annotations is None:
        raise MaskwatchError(
            f"{folder} is not a scene folder: it needs images/ and annotations/ (Pascal VOC) or labels/ (YOLO)"
        )
    suffix = ".xml" if annotations.name == "annotations" else ".txt"
    pairs = [(path, annotations / f"{path.stem}{suffix}") for path in images_in(folder / "images")]
    if not pairs:
        raise MaskwatchError(f"{folder / 'images'} holds no picture")
    for image_path, annotation_path in pairs:
        if not annotation_path.is_file():
            raise MaskwatchError(f"{image_path.name} has no annotation {annotation_path}")
    return pairs


def read_boxes(path: Path, width: int, height: int, left_out: LeftOut | None = None) -> list[LabelledBox]:
    """The labelled faces of one annotation file (.xml: Pascal VOC, .txt: YOLO), clipped to the image of width ×
    height pixels. Boxes that lie outside it are left out, and go to `left_out` with the reason.

    Raises `MaskwatchError` for a file that isn't such an annotation and for an unknown label.
    """
    read = _yolo_boxes(path, width, height) if path.suffix == ".txt" else _voc_boxes(path)
    labelled = []
    for number, (name, box) in enumerate(read):
        label = class_of(name, path)
        x1, x2 = (min(max(value, 0.0), float(width)) for value in box[0::2])
        y1, y2 = (min(max(value, 0.0), float(height)) for value in box[1::2])
        if x2 > x1 and y2 > y1:
            labelled.append(LabelledBox((x1, y1, x2, y2), label, name == WORN_WRONGLY))
        elif left_out is not None:
            corners = ", ".join(f"{value:g}" for value in box)
            left_out.append((f"{path.name}#{number}", f"box ({corners}) is outside the picture of {width}×{height}"))
    return labelled


def _voc_boxes(path: Path) -> Iterator[tuple[str, Sequence[float]]]:
    """(label, corners) of a Pascal VOC file. Corners are edges: a box from xmin 10 to xmax 20 is 10 pixels wide."""
    try:
        # Annotations are the user's own files, so expat's limits on entities are enough.
        for entry in ElementTree.parse(path).getroot().iter("object"):
            corners = [float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            yield entry.findtext("name", "").strip(), corners
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise MaskwatchError(f"{path} is not a Pascal VOC annotation: {error}") from error


def _yolo_boxes(path: Path, width: int, height: int) -> Iterator[tuple[str, Sequence[float]]]:
    """(label, corners) of a YOLO file: per line a class number, then the box's centre and size as fractions of the
    image's (docs.ultralytics.com/datasets/detect)."""
    names = _yolo_names(path)
    for line in read_text(path).splitlines():
        if not line.strip():
            continue
        try:
            number, centre_x, centre_y, part_w, part_h = line.split()
            name = names[int(number)] if int(number) >= 0 else ""
            x, half_w = float(centre_x) * width, float(part_w) * width / 2
            y, half_h = float(centre_y) * height, float(part_h) * height / 2
        except (ValueError, IndexError) as error:
            raise MaskwatchError(
                f"{path} is not a YOLO annotation of {len(names)} classes: the line {line[:60]!r} is not "
                "`class centre_x centre_y width height`"
            ) from error
        yield name, (x - half_w, y - half_h, x + half_w, y + half_h)


def _yolo_names(path: Path) -> list[str]:
    """The names of the classes that a label file numbers."""
    places = [folder / name for folder in (path.parent, path.parent.parent) for name in YOLO_NAMES]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise MaskwatchError(
            f"{path.parent.parent} has no names for its numbered classes: put a {YOLO_NAMES[0]} there, "
            f"with a line per class out of {', '.join(CLASS_OF_LABEL)}"
        )
    return [line.strip() for line in read_text(found).splitlines() if line.strip()]
