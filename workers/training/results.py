"""Writes the results of a training: the network as ONNX and as Keras weights, metrics.json, plots, a model card.

All figures are measured on the ONNX file, which workers run, with faces that were held out from the beginning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.files import write_atomically
from common.machine import threads_per_process
from common.settings import PipelineSettings
from workers.classification import networks
from workers.classification.network_classifier import NetworkMaskClassifier
from workers.datasets import augment
from workers.datasets.annotations import CLASS_NAMES
from workers.datasets.dataset import FaceSample, FaceSet, Split
from workers.evaluation import plots
from workers.evaluation.calibration import fit_temperature, reliability_bins
from workers.evaluation.faces import FaceResults, evaluate_faces
from workers.inference import Runtime
from workers.inference.onnx_session import make_session
from workers.training import batches, export, fit
from workers.training.fit import Progress
from workers.training.recipes import FitSettings, Recipe

#: Origin and licence of data, by the name of its source (from the manifest, else the folder's name).
KNOWN_SOURCES = {
    "chandrika": "chandrikadeb7/Face-Mask-Detection (repository MIT; photos collected from the web)",
    "karim12k": "Kaggle face-mask-12k (CC0 as published; its unmasked half is CelebA: non-commercial research)",
    "prajnasb": "prajnasb/observations (masks pasted on photos; no licence recorded)",
    "scenes_train": "Kaggle andrewmvd/face-mask-detection (CC0 as published; press photos)",
}

#: A file of weights above this, in single precision, is kept in half precision.
HALF_ABOVE_BYTES = 8_000_000

#: How many faces the grid of samples shows.
SAMPLES_SHOWN = 32

Classify = Callable[[Sequence[NDArray[np.uint8]]], NDArray[np.float32]]


def leave(
    model: Any, progress: Progress, faces: FaceSet, split: Split, settings: FitSettings, out: Path
) -> dict[str, Any]:
    """Writes everything into `out`, and returns the content of metrics.json, which is written last: a folder with it
    holds a finished training.

    Errors as `export.export_onnx`.
    """
    views = fit.validation_views(split.validation, settings.side)
    temperature = _temperature(model, views, settings)
    onnx_path = out / f"{settings.arch}.onnx"
    model.save_weights(out / f"{settings.arch}.weights.h5")
    half = 4 * model.count_params() > HALF_ABOVE_BYTES
    difference = export.export_onnx(model, settings, onnx_path, views[0].crops, temperature=temperature, half=half)

    classifier = NetworkMaskClassifier(make_session(onnx_path.read_bytes(), Runtime(threads=threads_per_process(1))))
    results = held_out_results(split.held_out, classifier.classify)
    held_out = {name: result.summary(PipelineSettings().uncertain_below) for name, result in results.items()}
    for summary in held_out.values():
        summary.pop("report_text")
    values = {
        "settings": settings.as_dict(),
        "data": {
            "faces": faces.counts(),
            "sources": faces.sources(),
            "unreadable": [{"file": name, "reason": reason} for name, reason in faces.unreadable],
            "training_faces": len(split.training),
            "validation_faces": len(split.validation),
            "held_out_faces": len(split.held_out),
        },
        "best_epoch": progress.best_epoch,
        "best_loss": progress.best_loss,
        "history": progress.history,
        "temperature": temperature,
        "onnx": {
            "sha256": hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
            "bytes": onnx_path.stat().st_size,
            "precision": "float16" if half else "float32",
            "parameters": export.parameter_count(onnx_path),
            "difference": difference,
            "crops_per_second_one_thread": export.crops_per_second(onnx_path, settings.side),
        },
        "held_out": held_out,
    }
    _draw(out, progress, split, settings, results, values)
    (out / "held_out.txt").write_text("".join(f"{sample.name}\n" for sample in split.held_out), encoding="utf-8")
    (out / f"{settings.arch}.md").write_text(model_card(settings.arch, values), encoding="utf-8")
    write_atomically(out / "metrics.json", json.dumps(values, indent=2) + "\n")
    return values


def _temperature(model: Any, views: Sequence[fit.ValidationView], settings: FitSettings) -> float:
    """The temperature that calibrates the probabilities of faces at their own size; 1 for the notebook's recipe, which
    has no temperature and no faces to fit it on."""
    if settings.recipe is Recipe.NOTEBOOK:
        return 1.0
    shipped = networks.mirrored(model)
    own_size = [view for view in views if view.name in ("scenes", "folders")]
    probabilities = [shipped.predict(view.crops, batch_size=128, verbose=0) for view in own_size]
    return fit_temperature(np.concatenate(probabilities), np.concatenate([view.labels for view in own_size]))


def held_out_results(samples: Sequence[FaceSample], classify: Classify) -> dict[str, FaceResults]:
    """Results of a classifier on held-out faces: of scenes, cut as in production, and of class folders, at their own
    size and scaled down."""
    found = {}
    scene = [sample for sample in samples if sample.from_scene and sample.size_px >= fit.JUDGED_FROM_PX]
    if scene:
        found["scenes"] = evaluate_faces(scene, classify)
    folder = [sample for sample in samples if not sample.from_scene]
    if folder:
        found["folders"] = evaluate_faces(folder, classify)
        for size in augment.VALIDATION_SIZES_PX:
            found[f"folders at {size:.0f} px"] = evaluate_faces(folder, classify, size)
    return found


def _draw(
    out: Path, progress: Progress, split: Split, settings: FitSettings, results: dict[str, FaceResults],
    values: dict[str, Any],
) -> None:  # fmt: skip
    plots.curves(out / "curves.png", [{k: v for k, v in row.items() if k != "side"} for row in progress.history])
    crops, labels = batches.batches_for(split.training, settings).batch(0, settings.side)
    indices = labels.argmax(axis=1) if labels.ndim == 2 else labels
    pixels = np.rint((crops[:SAMPLES_SHOWN] + 1) * 127.5).astype(np.uint8)
    plots.grid(out / "samples.png", list(pixels), [CLASS_NAMES[at] for at in indices[:SAMPLES_SHOWN]], "training crops")
    mistakes = []
    for name, result in results.items():
        path = out / f"confusion-{name.replace(' ', '-')}.png"
        plots.confusion(path, values["held_out"][name]["all"]["confusion"], f"held out: {name}")
        bins = reliability_bins(result.probabilities, result.labels)
        plots.reliability(out / f"reliability-{name.replace(' ', '-')}.png", bins, f"held out: {name}")
        if " at " not in name:
            mistakes += result.mislabelled()
    if mistakes:
        shown = sorted(mistakes, key=lambda mistake: -mistake.badness)[:SAMPLES_SHOWN]
        plots.grid(
            out / "mistakes.png", [entry.crop for entry in shown], [entry.words for entry in shown], "surest mistakes"
        )


def model_card(name: str, values: dict[str, Any]) -> str:
    """The model card in Markdown, from the values of metrics.json."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Markdown, not HTML, so nothing is escaped. The values are our own figures and names of files.
    environment = Environment(
        loader=PackageLoader("workers.training", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["thousands"] = lambda value: f"{value:,.0f}"
    return environment.get_template("model_card.md.j2").render(
        name=name, classes=CLASS_NAMES, known_sources=KNOWN_SOURCES, networks=NETWORKS, **values
    )


#: A description of each network, for the model card.
NETWORKS = {
    "compact": "separable convolutions with residuals",
    "efficientnet-lite0": "EfficientNet-Lite0",
    "xception": "Xception, global average pooling, Dense 1024, Dropout 0.5, softmax 2",
}
