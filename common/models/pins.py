"""The hashes that this machine remembers for model files whose hash nobody has published.

`maskwatch models pull` and `import` write them once, beside the files; from then on the bare name means that very
file, and another one is refused. Standard library only: the producer plans with these hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common.domain import MaskwatchError, first_line
from common.files import write_atomically

PINS_FILE = "pins.json"


def read_pins(models_dir: Path) -> dict[str, str]:
    """File name → SHA-256 as 64 hexadecimal digits; empty where nothing was pinned yet.

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
        raise MaskwatchError(f"{path} holds something else than hashes; restore it, or remove it and pull again")
    return pins


def remember_pins(models_dir: Path, pins: Mapping[str, str]) -> None:
    """Add pins to those of the folder. Whoever calls holds the folder's lock (`workers.weights.download.staging`)."""
    if not pins:
        return
    path = models_dir / PINS_FILE
    write_atomically(path, json.dumps({**read_pins(models_dir), **pins}, indent=2, sort_keys=True) + "\n")


def is_sha256(value: object) -> bool:
    """Whether it is a SHA-256 as Maskwatch writes it: 64 characters of 0-9 and a-f."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
