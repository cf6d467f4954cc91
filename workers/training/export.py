"""From a fitted network to what a worker runs: an ONNX file that was checked against the network it came from,
the figures as metrics.json and, for people, a model card.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from workers.training.dataset import CLASS_NAMES, FaceSample, FaceSet
from workers.training.evaluate import SIZE_BINS, label_figures, size_bin
from workers.training.fit import FitSettings, Progress, ValidationView

#: ONNX operator set: old enough for every ONNX Runtime this project supports.
OPSET = 17

#: Largest difference of a probability between the network and its ONNX file.
TOLERANCE = 1e-4

#: What is known about data by the name of its source (the manifest's, else the folder's): origin and licence.
KNOWN_SOURCES = {
    "chandrika": "chandrikadeb7/Face-Mask-Detection (repository MIT; photos collected from the web)",
    "karim12k": "Kaggle face-mask-12k (CC0 as published; its unmasked half is CelebA: non-commercial research)",
    "prajnasb": "prajnasb/observations (masks pasted on photos; no licence recorded)",
    "scenes_train": "Kaggle andrewmvd/face-mask-detection (CC0 as published; press photos)",
}


def export_onnx(model: Any, side: int, path: Path, crops: NDArray[np.float32]) -> float:
    """Writes the network as ONNX: input `crops` float32 (n, side, side, 3), output softmax `probabilities` (n, 2).

    Returns the largest difference of a probability over `crops`. Raises `MaskwatchError` and writes nothing if it
    is above `TOLERANCE`.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec((None, side, side, 3), tf.float32, name="crops")]
    function = tf.function(lambda batch: model(batch, training=False), input_signature=signature)
    converted, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    _name_output(converted, "probabilities")
    onnx.checker.check_model(converted)
    content: bytes = converted.SerializeToString()
    expected = model.predict(crops, batch_size=256, verbose=0)
    difference = float(np.abs(_run(content, crops) - expected).max())
    if difference > TOLERANCE:
        raise MaskwatchError(
            f"the ONNX file differs from the network by {difference:.1e} in a probability; allowed: {TOLERANCE:.0e}"
        )
    part = path.with_suffix(".onnx.part")
    part.write_bytes(content)
    part.replace(path)
    return difference


def _name_output(converted: Any, name: str) -> None:
    """A speaking name instead of the one the conversion made up."""
    (output,) = converted.graph.output
    for node in converted.graph.node:
        node.output[:] = [name if value == output.name else value for value in node.output]
    output.name = name


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run(content: bytes, crops: NDArray[np.float32]) -> NDArray[np.float32]:
    session = _session(content)
    parts = [session.run(None, {"crops": crops[at : at + 256]})[0] for at in range(0, len(crops), 256)]
    return np.concatenate(parts)


def crops_per_second(path: Path, side: int, batch: int = 16, seconds: float = 1.0) -> float:
    """Crops per second of the ONNX file on one thread of this machine, in the best of the batches it has time for."""
    session = _session(path.read_bytes())
    crops = np.zeros((batch, side, side, 3), np.float32)
    session.run(None, {"crops": crops})
    best = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        session.run(None, {"crops": crops})
        best = min(best, time.perf_counter() - start)
    return batch / best


def parameter_count(path: Path) -> int:
    """Numbers in the initialisers of an ONNX file: what the network learned, normalisation folded in or not."""
    import onnx

    initialisers = onnx.load(path).graph.initializer
    return int(sum(np.prod(weights.dims) for weights in initialisers if weights.data_type == onnx.TensorProto.FLOAT))


def metrics(
    model: Any, faces: FaceSet, training: Sequence[FaceSample], views: Sequence[ValidationView],
    settings: FitSettings, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """What metrics.json holds: settings, data, the course of the training, held-out figures per view and face size."""
    held_out = {sample.group for view in views for sample in view.samples if sample.from_scene}
    return {
        "settings": asdict(settings),
        "data": {
            "faces": faces.counts(),
            "sources": faces.sources(),
            "unreadable": [{"file": name, "reason": reason} for name, reason in faces.unreadable],
            "training_faces": len(training),
            "validation_faces": len(faces.samples) - len(training),
            "validation_scenes": sorted(group.split("/", 1)[1] for group in held_out),
        },
        "best_epoch": progress.best_epoch,
        "validation_loss": progress.best_loss,
        "history": progress.history,
        "validation": {view.name: _view_figures(model, view) for view in views},
    }


def _view_figures(model: Any, view: ValidationView) -> dict[str, Any]:
    predicted = model.predict(view.crops, batch_size=256, verbose=0).argmax(axis=1)
    figures: dict[str, Any] = {"all": label_figures(view.labels, predicted)}
    if view.name == "scenes":
        bins = np.array([size_bin(sample.size_px) for sample in view.samples])
        for name in SIZE_BINS:
            if (bins == name).any():
                figures[name] = label_figures(view.labels[bins == name], predicted[bins == name])
    return figures


def write_metrics(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def model_card(onnx_path: Path, values: dict[str, Any]) -> str:
    """The model card in Markdown, from the values of metrics.json and the file beside it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Markdown, not HTML: nothing to escape. The values are our own figures and names of files.
    environment = Environment(
        loader=PackageLoader("workers.training", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["thousands"] = lambda value: f"{value:,.0f}"
    return environment.get_template("model_card.md.j2").render(
        name=onnx_path.stem,
        classes=CLASS_NAMES,
        parameters=parameter_count(onnx_path),
        sha256=hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
        known_sources=KNOWN_SOURCES,
        **values,
    )
