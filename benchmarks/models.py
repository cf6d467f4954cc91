"""What the models cost on a CPU: ONNX Runtime, the frameworks themselves and the notebook's way, in one run.

The claims: RetinaFace under ONNX Runtime is as many times faster than fdet as measured when it was chosen; finding
the boxes takes less than 10 % of its time; four frames of 1000×562 take ResNet50 less than 1 GB; classifiers under
ONNX Runtime are at least as fast as in Keras, and four times as fast as the notebook's `predict` of one crop each.
RetinaFace and Xception have seeded random weights: what a network computes does not depend on them.

    python -m benchmarks.models [--quick] [--json]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.models.pipeline import spec_of

SIZES = ((640, 480), (1000, 562))
BACKBONES = ("mobilenet", "resnet50")
#: What the manifest calls fdet's own detectors.
FDET_NAMES = {"mobilenet": "fdet-retinaface-mobilenet", "resnet50": "fdet-retinaface"}
#: Times faster than fdet, at least: the ratios measured on two AVX2 cores when ONNX Runtime was chosen.
FASTER_THAN_FDET = {
    ("mobilenet", 640): 83 / 14, ("mobilenet", 1000): 151 / 24,
    ("resnet50", 640): 825 / 482, ("resnet50", 1000): 1238 / 895,
}  # fmt: skip
FASTER_THAN_PREDICT = 4.0
POST_SHARE = 0.10
MEMORY_MB = 1000
#: Prior boxes that reach the threshold, which is set so: about what a crowd of fifty faces gives.
CANDIDATES = 300
#: Crops per forward pass, as many as a picture of a crowd has.
CROPS = 32
#: Rounds of everything, in turn; the best counts, for only the best is free of what else the machine does.
ROUNDS, QUICK_ROUNDS = 10, 3

Timed = Callable[[], object]


@click.command()
@click.option("--quick", is_flag=True, help="The small networks only, few rounds, no memory: that it runs.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each network; unset: as many as cores.")
@click.option("--json", "as_json", is_flag=True)
def main(quick: bool, threads: int | None, as_json: bool) -> None:
    """Compare the engines with each other and with the notebook's way."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_MODELS_DIR"] = str(folder)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    rounds = QUICK_ROUNDS if quick else ROUNDS
    about = machine(threads)
    threads = about["threads"]
    try:
        rows = [
            row for backbone in BACKBONES[: 1 if quick else 2] for row in detectors(folder, backbone, threads, rounds)
        ]
        passes = [] if quick else [memory(folder, engine, threads) for engine in ("onnx", "native")]
        measured, not_measured = classifiers(folder, threads, rounds, with_xception=not quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "machine": about,
        "rounds": rounds,
        "detectors": rows,
        "memory": passes,
        "classifiers": measured,
        "not_measured": not_measured,
    }
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


def machine(threads: int | None) -> dict[str, Any]:
    """What the figures are taken on, with how many threads, and how busy it was before they began."""
    from common.machine import usable_cores

    with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
        name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    cores = usable_cores()
    return {"cpu": name, "cores": cores, "threads": threads or cores, "load_before": os.getloadavg()[0]}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people, each beside its bar."""
    about = result["machine"]
    text = [
        f"{about['cpu']}, {about['threads']} threads on {about['cores']} cores, load {about['load_before']:.1f} before"
        f", best of {result['rounds']} rounds"
    ]
    for row in result["detectors"]:
        text += [
            f"retinaface-{row['backbone']} at {row['width']}×{row['height']}",
            f"  onnx {row['onnx_ms']:.0f} ms, native {row['native_ms']:.0f} ms, fdet {row['fdet_ms']:.0f} ms",
            f"  onnx is {row['faster_than_fdet']:.2f} times as fast as fdet (the bar: {row['bar']:.2f}), "
            f"{row['native_ms'] / row['onnx_ms']:.2f} times as fast as native (the bar: 1)",
            f"  post-processing of {row['candidates']} candidates is {100 * row['post_share']:.1f} % of it "
            f"(the bar: under {100 * POST_SHARE:.0f} %)",
        ]
    for row in result["memory"]:
        text += [
            f"retinaface-resnet50, four frames of 1000×562, {row['engine']}",
            f"  {row['peak_mb']:.0f} MB above the loaded network (the bar: under {MEMORY_MB}), "
            f"{row['total_mb']:.0f} MB with it and all libraries",
        ]
    for row in result["classifiers"]:
        text += [
            f"{row['name']} at {row['side']} px, {CROPS} crops a batch",
            f"  onnx {row['onnx_per_s']:.0f} crops/s, native {row['native_per_s']:.0f}, "
            f"predict one by one {row['predict_per_s']:.1f}",
            f"  onnx is {row['faster_than_native']:.2f} times as fast as native (the bar: 1), "
            f"{row['faster_than_predict']:.1f} times as fast as predict (the bar: {FASTER_THAN_PREDICT:.0f})",
        ]
    return text + [f"{name}: not measured, {reason}" for name, reason in result["not_measured"].items()]


def best_of(rounds: int, timed: dict[str, Timed]) -> dict[str, float]:
    """The best seconds of each, taken in turn after one call to warm up."""
    seconds = {}
    for number in range(rounds + 1):
        for name, call in timed.items():
            started = time.perf_counter()
            call()
            if number > 0:
                seconds[name] = min(time.perf_counter() - started, seconds.get(name, float("inf")))
    return seconds


def detectors(folder: Path, backbone: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """RetinaFace with seeded random weights, at each size."""
    from common.models.manifest import MODELS

    path = folder / MODELS[FDET_NAMES[backbone]].files[0].name
    write_weights(backbone, path)
    return [detector(backbone, path, images(1, width, height)[0], threads, rounds) for width, height in SIZES]


def detector(backbone: str, path: Path, image: Any, threads: int, rounds: int) -> dict[str, Any]:
    """RetinaFace under both engines and in fdet, one picture per call as it is, for fdet knows no scaling."""
    from common.domain import ModelRef
    from common.models.manifest import MODELS
    from common.settings import PipelineSettings, get_settings
    from workers.detection.fdet_package import load_fdet_retinaface
    from workers.detection.retinaface import RetinaFace
    from workers.inference import Runtime

    runtime = Runtime(threads=threads)
    sessions = {engine: session(engine, backbone, path, runtime) for engine in ("onnx", "native")}
    score = threshold(sessions["onnx"], image)
    spec = replace(spec_of(PipelineSettings(), get_settings().models_dir), enlarge_below_px=0, detector_threshold=score)
    model = MODELS[FDET_NAMES[backbone]]
    pinned = ModelRef(model.name, str(model.sha256_with([hashlib.sha256(path.read_bytes()).hexdigest()])))
    ours = {engine: RetinaFace(spec, loaded) for engine, loaded in sessions.items()}
    fdet = load_fdet_retinaface(replace(spec, detector=pinned), runtime)
    best = best_of(
        rounds,
        {
            "onnx": lambda: ours["onnx"].detect(image),
            "native": lambda: ours["native"].detect(image),
            "fdet": lambda: fdet.detect(image),
            "post": after(sessions["onnx"], image, score),
        },
    )
    height, width = image.shape[:2]
    return {
        "backbone": backbone,
        "width": width,
        "height": height,
        "candidates": CANDIDATES,
        "faces": len(ours["onnx"].detect(image)),
        **{f"{name}_ms": 1000 * seconds for name, seconds in best.items()},
        "faster_than_fdet": best["fdet"] / best["onnx"],
        "bar": FASTER_THAN_FDET[backbone, width],
        "post_share": best["post"] / best["onnx"],
    }


def write_weights(backbone: str, path: Path) -> None:
    """Seeded random weights of RetinaFace in the format of the published ones."""
    import torch

    from workers.detection.retinaface_network import RetinaFaceNetwork

    torch.manual_seed(1)
    torch.save(RetinaFaceNetwork(backbone).state_dict(), path)  # type: ignore[arg-type]


def session(engine: str, backbone: str, weights: Path, runtime: Any) -> Any:
    """RetinaFace's network in an engine. The ONNX file is made once and lies beside the weights."""
    from workers.detection.retinaface_network import export_onnx, load_weights
    from workers.inference.onnx_session import make_session
    from workers.inference.torch_session import TorchSession

    network = load_weights(weights.read_bytes(), backbone)  # type: ignore[arg-type]
    if engine == "native":
        return TorchSession(network, runtime, ("n", 3, "height", "width"))
    exported = weights.with_suffix(".onnx")
    if not exported.exists():
        exported.write_bytes(export_onnx(network))
    return make_session(exported.read_bytes(), runtime)


def images(count: int, width: int, height: int) -> Any:
    import numpy as np

    return np.random.default_rng(2).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def threshold(loaded: Any, image: Any) -> float:
    """The score that `CANDIDATES` of the prior boxes reach."""
    import numpy as np

    from workers.detection.retinaface import to_input

    scores = loaded.run(to_input(image))[1][0]
    return float(np.sort(scores)[-CANDIDATES])


def after(loaded: Any, image: Any, score: float) -> Timed:
    """What follows the forward pass: priors, decoding, suppression, clipping."""
    from workers.detection._anchors import priors
    from workers.detection._ops import MIN_SIDE_PX, clip, has_area
    from workers.detection.retinaface import find, to_input

    locations, scores, _ = loaded.run(to_input(image))
    height, width = image.shape[:2]

    def post() -> object:
        boxes, found = find(locations[0], scores[0], priors(height, width), score)
        boxes = clip(boxes, width, height)
        whole = has_area(boxes, at_least_px=MIN_SIDE_PX)
        return boxes[whole], found[whole]

    return post


def memory(folder: Path, engine: str, threads: int) -> dict[str, Any]:
    """Peak memory of a forward pass of four frames, in a process of its own."""
    from common.models.manifest import MODELS

    weights = folder / MODELS["retinaface-resnet50"].files[0].name
    code = f"from benchmarks.models import pass_of_four; pass_of_four({engine!r}, {str(weights)!r}, {threads})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"engine": engine, **json.loads(done.stdout)}


def pass_of_four(engine: str, weights: str, threads: int) -> None:
    """Runs in the child: prints what the pass took above the loaded network, and in all."""
    import numpy as np

    from workers.inference import Runtime
    from workers.inference.onnx_session import make_session

    runtime = Runtime(threads=threads)
    path = Path(weights)
    if engine == "onnx":  # without torch, as a worker runs it
        loaded: Any = make_session(path.with_suffix(".onnx").read_bytes(), runtime)
    else:
        loaded = session("native", "resnet50", path, runtime)
    batch = images(4, 1000, 562).transpose(0, 3, 1, 2).astype(np.float32)
    # Loading may have needed more than running does: forget that peak. And no `ru_maxrss`, for a child begins with
    # its parent's.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_mb("VmRSS")
    loaded.run(batch)
    peak = _status_mb("VmHWM")
    print(json.dumps({"peak_mb": peak - before, "total_mb": peak}))


def _status_mb(field: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:"))) / 1024


def classifiers(
    folder: Path, threads: int, rounds: int, *, with_xception: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every classifier of the manifest, and Xception with random weights; and which could not be measured, and why."""
    from common.domain import MaskwatchError
    from common.models.manifest import MODELS, ModelKind
    from workers.weights.files import read_model

    models = [model for model in MODELS.values() if model.kind is ModelKind.CLASSIFIER]
    contents: dict[str, Callable[[], bytes]] = {model.name: partial(read_model, model.ref) for model in models}
    if with_xception:
        contents["xception, random weights"] = partial(random_xception, folder)
    rows, not_measured = [], {}
    for name, content in contents.items():
        try:
            rows.append(classifier(name, content(), threads, rounds))
        except MaskwatchError as error:
            not_measured[name] = str(error)
    return rows, not_measured


def classifier(name: str, content: bytes, threads: int, rounds: int) -> dict[str, Any]:
    """Crops per second of one network, in both engines and one by one through Keras's `predict`."""
    import numpy as np
    import tensorflow as tf

    from workers.classification.keras_session import KerasSession, to_keras
    from workers.inference import Runtime
    from workers.inference.onnx_session import make_session

    if tf.config.threading.get_intra_op_parallelism_threads() != threads:  # can be set before the first use alone
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    onnx = make_session(content, Runtime(threads=threads))
    network = to_keras(content, name)
    native = KerasSession(network, "/CPU:0")
    side = network.input_shape[1]
    crops = (images(CROPS, side, side) / 127.5 - 1).astype(np.float32)
    # Eight of them one by one say as much as all.
    best = best_of(
        rounds,
        {
            "onnx": lambda: onnx.run(crops),
            "native": lambda: native.run(crops),
            "predict": lambda: [network.predict(crop[None], verbose=0) for crop in crops[:8]],
        },
    )
    per_s = {"onnx": CROPS / best["onnx"], "native": CROPS / best["native"], "predict": 8 / best["predict"]}
    return {
        "name": name,
        "side": side,
        **{f"{way}_per_s": value for way, value in per_s.items()},
        "faster_than_native": per_s["onnx"] / per_s["native"],
        "faster_than_predict": per_s["onnx"] / per_s["predict"],
    }


def random_xception(folder: Path) -> bytes:
    """The notebook's network at its size with seeded random weights, exported as a training exports it."""
    import keras
    import numpy as np

    from workers.classification.networks import build
    from workers.training.export import export_onnx
    from workers.training.recipes import FitSettings, Recipe, Stage

    keras.utils.set_random_seed(3)
    settings = FitSettings("xception", Recipe.NOTEBOOK, (Stage(128, 1),), 32, 1e-4)
    path = folder / "xception.onnx"
    export_onnx(build("xception", 128), settings, path, np.zeros((2, 128, 128, 3), np.float32))
    return path.read_bytes()


if __name__ == "__main__":
    main()
