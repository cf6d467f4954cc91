"""Geometry of boxes on the device: what `_ops` and `_anchors` do, for a batch of images, over torch tensors.

Nothing here copies a tensor to the host. Boxes are xyxy in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from workers.detection import _anchors

#: Rounds of the suppression between two checks whether it has settled: each check waits for the device.
ROUNDS = 4


@lru_cache(maxsize=64)
def priors(height: int, width: int, device: Any) -> Any:
    """`_anchors.priors` on a `torch.device`: float32 (p, 3). Not to be written to."""
    return torch.from_numpy(_anchors.priors(height, width).copy()).to(device)


def decode(locations: Any, priors_px: Any) -> Any:
    """Boxes (..., 4), from the network's locations (..., 4) for these priors (..., 3); as `_anchors.decode`."""
    sides = priors_px[..., 2:]
    centres = priors_px[..., :2] + locations[..., :2] * _anchors.CENTRE_VARIANCE * sides
    growth = (locations[..., 2:] * _anchors.SIZE_VARIANCE).clamp(max=_anchors.MAX_LOG_SIZE)
    halves = sides * growth.exp() / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)


def best(scores: Any, threshold: float, limit: int) -> tuple[Any, Any]:
    """For each image its best scores (n, k), best first, and where they stood (n, k); equal ones in their order.

    scores: (n, p). k is the largest number of scores of one image that reach the threshold, at most `limit`; a
    image with fewer has scores below the threshold at its end. Waits for the device once, to learn k.
    """
    most = int((scores >= threshold).sum(dim=1).max()) if scores.numel() else 0
    ordered, where = scores.sort(dim=1, descending=True, stable=True)
    count = min(most, limit)
    return ordered[:, :count], where[:, :count]


def iou(boxes_xyxy: Any) -> Any:
    """Intersection over union of every box with every other of its image: (n, k, 4) → (n, k, k). 0 for empty ones."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(dim=-1)
    wide = (torch.minimum(x2[:, :, None], x2[:, None, :]) - torch.maximum(x1[:, :, None], x1[:, None, :])).clamp(min=0)
    tall = (torch.minimum(y2[:, :, None], y2[:, None, :]) - torch.maximum(y1[:, :, None], y1[:, None, :])).clamp(min=0)
    both = wide * tall
    areas = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    either = areas[:, :, None] + areas[:, None, :] - both
    return torch.where(either > 0, both / either, torch.zeros_like(both))


def nms(boxes_xyxy: Any, candidates: Any, max_iou: float) -> Any:
    """Greedy non-maximum suppression in every image of a batch: which boxes to keep, bool (n, k).

    boxes_xyxy: (n, k, 4), the best of each image first. candidates: bool (n, k), what takes part. A box is dropped
    if it overlaps a better one that is kept by `max_iou` or more; the same boxes as `_ops.nms` keeps.

    Every round decides all boxes at once from those the round before kept. The best box is right from the start, and
    each round makes at least the next one right for good, so it settles on the greedy answer; in a few rounds, for it
    needs no more than the longest chain of boxes that each depend on the one before.
    """
    count = boxes_xyxy.shape[1]
    # [n, i, j]: box j is better than box i and overlaps it too much.
    beaten = (iou(boxes_xyxy) >= max_iou).tril(diagonal=-1) & candidates[:, None, :]
    kept = candidates
    for _ in range(0, count, ROUNDS):
        for _ in range(ROUNDS):
            before = kept
            kept = candidates & ~(beaten & kept[:, None, :]).any(dim=-1)
        if bool((kept == before).all()):
            break
    return kept


def clip(boxes_xyxy: Any, width: float, height: float) -> Any:
    """The boxes (..., 4) cut at the edges of an image of width × height pixels."""
    x = boxes_xyxy[..., 0::2].clamp(0, width)
    y = boxes_xyxy[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
