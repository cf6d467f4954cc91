"""Reads files of torch weights without executing anything in them, and puts them into a network that they must fit.

Checking that a file is the pinned one is left to `workers.weights.files`.
"""

from __future__ import annotations

import io
from typing import Any

from common.domain import MaskwatchError, first_line

#: How many names of each kind an error lists; the rest are only counted.
NAMES_LISTED = 3


def read_state(content: bytes, what: str) -> dict[str, Any]:
    """The tensors of a file that `torch.save` wrote, by name, on the CPU.

    Takes a plain state dict, one inside a dict under `state_dict`, and names that all begin with `module.`, as
    `torch.nn.DataParallel` writes them. what: names the file in errors.

    Raises `MaskwatchError` if the file is damaged, or holds anything but weights; no code in it is run.
    """
    import pickle

    import torch

    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MaskwatchError(
            f"{what} holds something else than weights, or is damaged, and was not run ({_first_sentence(error)}); "
            "get it again, or save only the network's state_dict()"
        ) from error
    except Exception as error:  # torch has no error of its own for a file that ends early
        raise MaskwatchError(
            f"{what} can't be read as torch weights ({_first_sentence(error)}); get it again"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(value, torch.Tensor) for value in loaded.values())
    ):
        raise MaskwatchError(f"{what} holds no state dict, which is a dict of tensors by name")
    if all(name.startswith("module.") for name in loaded):
        loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    return dict(loaded)


def fill(module: Any, state: dict[str, Any], what: str) -> None:
    """Puts the tensors into the module, each to the name it has. Afterwards the module is in eval mode.

    The number of batches that a normalisation has seen is ignored: older files lack it, and only training uses it.

    Raises `MaskwatchError` naming tensors that are missing, left over or of another shape; the module is then as
    it was.
    """
    wanted = module.state_dict()
    names, given = _counted(wanted), _counted(state)
    differences = [
        ("missing", sorted(names - given)),
        ("not in the network", sorted(given - names)),
        (
            "of another shape",
            [
                f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
                for name in sorted(names & given)
                if state[name].shape != wanted[name].shape
            ],
        ),
    ]
    told = [f"{kind}: {_listed(found)}" for kind, found in differences if found]
    if told:
        raise MaskwatchError(f"{what} is of another network; {'; '.join(told)}")
    module.load_state_dict({name: state[name] for name in names}, strict=False)
    module.eval()


def _counted(state: dict[str, Any]) -> set[str]:
    return {name for name in state if not name.endswith(".num_batches_tracked")}


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_LISTED
    return ", ".join(names[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def _first_sentence(error: Exception) -> str:
    # Torch goes on with advice to a programmer, in the same line.
    return first_line(error).partition(". ")[0]
