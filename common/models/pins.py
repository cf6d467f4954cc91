"""The hashes that this machine has pinned for model files without a published hash.

`maskwatch models pull` and `import` write them once, beside the files; from then on the bare name means exactly that
file, and any other is refused. Standard library only: the producer plans with these hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common.domain import MaskwatchError, first_line
from common.files import write_atomically

PINS_FILE = "pins.json"


def read_pins(models_dir: Path) -> dict[str, str]:
    """File name → SHA-256 as 64 hexadecimal digits; empty if nothing is pinned yet.

    Raises `MaskwatchError` if the file of pins can't be read or holds something else.
    """
    path = models_dir / PINS_FILE
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MaskwatchError(f"{path} can't be read: {first_line(error)}") from error
    except ValueError as error:
        raise MaskwatchError(
            f"{path} is no JSON ({error}); restore it, or remove it and pull the models again"
        ) from error
    if not isinstance(pins, dict) or not all(is_sha256(value) for value in pins.values()):
        raise MaskwatchError(f"{path} does not hold hashes; restore it, or remove it and pull the models again")
    return pins


def remember_pins(models_dir: Path, pins: Mapping[str, str]) -> None:
    """Add pins to those of the folder. The caller holds the folder's lock (`workers.weights.download.staging`)."""
    if not pins:
        return
    path = models_dir / PINS_FILE
    write_atomically(path, json.dumps({**read_pins(models_dir), **pins}, indent=2, sort_keys=True) + "\n")


def is_sha256(value: object) -> bool:
    """Whether a value is a SHA-256 as Maskwatch writes it: 64 characters of 0-9 and a-f."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
