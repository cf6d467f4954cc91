"""Resizes frames and cuts faces out of them on the device: what OpenCV and `classification._ops` do on the CPU, for
whole batches of torch tensors.

Results are rounded to whole levels, as OpenCV's are, so they differ from the CPU's by a level or two at most.
Nothing here copies a tensor to the host.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional


def resized(frames_rgb: Any, height: int, width: int) -> Any:
    """Frames uint8 (n, h, w, 3) in another size: float32 (n, 3, height, width), whole levels in [0, 255].

    Averages where both sides shrink (cv2.INTER_AREA), else interpolates between the centres of pixels
    (cv2.INTER_LINEAR).
    """
    images = frames_rgb.permute(0, 3, 1, 2).float()
    if images.shape[2:] == (height, width):
        return images
    if height <= images.shape[2] and width <= images.shape[3]:
        return _averaged(_averaged(images, 2, height), 3, width).round()
    return functional.interpolate(images, size=(height, width), mode="bilinear", align_corners=False).round()


def face_crops(frames_rgb: Any, which: Any, boxes_xyxy: Any, below_px: float, factor: float, side: int) -> Any:
    """What a classifier sees of faces: float32 (m, side, side, 3) in [-1, 1].

    frames_rgb: uint8 (n, h, w, 3). which: int64 (m,), the frame of each face. boxes_xyxy: (m, 4), inside it. Widens,
    cuts whole pixels and resizes as `crop_for_classification` and `prepare_crop` do.
    """
    image_h, image_w = frames_rgb.shape[1:3]
    left, top, right, bottom = _pixel_boxes(boxes_xyxy.double(), image_h, image_w, below_px, factor)
    width, height = right - left, bottom - top
    averaged = width * height > side * side
    exactly = averaged & (width >= side) & (height >= side)
    sampled = _sampled(frames_rgb, which, _taps(left, width, averaged, side), _taps(top, height, averaged, side))
    steps = torch.arange(side + 1, device=frames_rgb.device, dtype=torch.float64) / side
    edges_x, edges_y = left[:, None] + steps * width[:, None], top[:, None] + steps * height[:, None]
    means = _means(_sums(frames_rgb), which, edges_x, edges_y) * (side * side / (width * height))[:, None, None, None]
    levels = torch.where(exactly[:, None, None, None], means.float(), sampled).round()
    return levels / 127.5 - 1.0


def _averaged(images: Any, axis: int, size: int) -> Any:
    """Each new pixel along the axis is the mean of the old pixels it covers, weighted by the covered share."""
    indices, weights = _area_weights(images.shape[axis], size, images.device)
    shape = [1] * images.ndim
    shape[axis] = size
    total = torch.zeros((), device=images.device)
    for index, weight in zip(indices, weights, strict=True):
        total = total + images.index_select(axis, index) * weight.reshape(shape)
    return total


@lru_cache(maxsize=64)
def _area_weights(old: int, new: int, device: Any) -> tuple[Any, Any]:
    """Which old pixels each of the new ones covers, int64 (taps, new), and with what weight, float32 (taps, new)."""
    scale = old / new
    starts = np.arange(new) * scale
    indices = np.floor(starts).astype(np.int64) + np.arange(int(np.ceil(scale)) + 1)[:, None]
    covered = np.minimum(indices + 1, starts + scale) - np.maximum(indices, starts)
    weights = (covered.clip(min=0) / scale).astype(np.float32)
    return torch.from_numpy(indices.clip(max=old - 1)).to(device), torch.from_numpy(weights).to(device)


def _pixel_boxes(boxes: Any, height: int, width: int, below_px: float, factor: float) -> tuple[Any, Any, Any, Any]:
    """`widen_box` and `pixel_box` for boxes float64 (m, 4): left, top, right, bottom, each int64 (m,)."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    small = (x2 - x1 < below_px) | (y2 - y1 < below_px)
    grown = torch.where(small, factor, 1.0) / 2
    centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
    half_w, half_h = (x2 - x1) * grown, (y2 - y1) * grown
    left = torch.where(small, centre_x - half_w, x1).clamp(min=0).floor().long().clamp(max=width - 1)
    top = torch.where(small, centre_y - half_h, y1).clamp(min=0).floor().long().clamp(max=height - 1)
    right = torch.where(small, centre_x + half_w, x2).ceil().long().clamp(max=width)
    bottom = torch.where(small, centre_y + half_h, y2).ceil().long().clamp(max=height)
    return left, top, torch.maximum(right, left + 1), torch.maximum(bottom, top + 1)


def _taps(start: Any, length: Any, averaged: Any, side: int) -> tuple[Any, Any, Any]:
    """The two pixels, int64 (m, side), between which each new one lies along an axis, and the second one's share.

    As OpenCV resizes a crop of `length` pixels from `start` on: between the centres of pixels, or, where a crop is to
    be averaged but is shorter than `side` along one axis, with INTER_AREA's rule for such a crop.
    """
    new = torch.arange(side, device=start.device, dtype=torch.float64)
    # Two true divisions, as in OpenCV, because INTER_AREA's rule jumps where a product is whole. torch computes a
    # number divided by a tensor as a product with the tensor's inverse, which rounds twice.
    one = torch.ones((), device=start.device, dtype=torch.float64)
    growth = (one * side) / length[:, None]
    scale = one / growth
    centred = (new + 0.5) * scale - 0.5
    first = torch.where(averaged[:, None], (new * scale).floor(), centred.floor())
    by_area = (new + 1) - (first + 1) * growth
    share = torch.where(averaged[:, None], by_area.float().clamp(min=0).frac(), (centred - first).float())
    last = length[:, None] - 1
    share = torch.where((first < 0) | (first >= last), 0.0, share)
    index = first.long().clamp(min=0).minimum(last)
    return start[:, None] + index, start[:, None] + (index + 1).minimum(last), share


def _sampled(frames: Any, which: Any, across: tuple[Any, Any, Any], down: tuple[Any, Any, Any]) -> Any:
    """Float32 (m, side, side, 3): each pixel mixed from four."""
    left, right, share_x = across
    upper, lower, share_y = down
    share_x, share_y = share_x[:, None, :, None], share_y[:, :, None, None]

    def row(y: Any) -> Any:
        return _at(frames, which, y, left).float() * (1 - share_x) + _at(frames, which, y, right).float() * share_x

    return row(upper) * (1 - share_y) + row(lower) * share_y


def _at(frames: Any, which: Any, y: Any, x: Any) -> Any:
    """(m, rows, columns, 3): the pixels at rows y (m, rows) and columns x (m, columns) of frames `which` (m,)."""
    return frames[which[:, None, None], y[:, :, None], x[:, None, :]]


def _sums(frames: Any) -> Any:
    """The sum of all pixels above and left of each corner of pixels: float64 (n, h + 1, w + 1, 3), exact."""
    # In place where possible: these are the largest tensors of the analysis.
    sums = torch.zeros(
        (frames.shape[0], frames.shape[1] + 1, frames.shape[2] + 1, 3), dtype=torch.float64, device=frames.device
    )
    sums[:, 1:, 1:] = frames
    return sums.cumsum_(dim=1).cumsum_(dim=2)


def _means(sums: Any, which: Any, edges_x: Any, edges_y: Any) -> Any:
    """The sum of the pixels between neighbouring edges, float64 (m, side, side, 3), for edges (m, side + 1).

    Pixels are constant over their area, so a sum up to an edge inside a pixel lies between those up to its corners.
    """
    left, upper = edges_x.long(), edges_y.long()
    share_x, share_y = (edges_x - left)[:, None, :, None], (edges_y - upper)[:, :, None, None]
    right, lower = (left + 1).clamp(max=sums.shape[2] - 1), (upper + 1).clamp(max=sums.shape[1] - 1)

    def row(y: Any) -> Any:
        return _at(sums, which, y, left) * (1 - share_x) + _at(sums, which, y, right) * share_x

    to_edges = row(upper) * (1 - share_y) + row(lower) * share_y
    return to_edges.diff(dim=1).diff(dim=2)
