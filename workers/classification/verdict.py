"""Makes the recorded face, and decides its status: `uncertain` if its larger probability is below the threshold."""

from __future__ import annotations

from common.domain import Face, MaskStatus


def face_of(
    box_xyxy: tuple[float, float, float, float], score: float, p_with_mask: float, uncertain_below: float
) -> Face:
    """The face to record. score and p_with_mask are in [0, 1], or outside only by rounding."""
    # The network's two float32 add up to 1 only nearly, so the second is computed from the first.
    p_with_mask = min(1.0, max(0.0, p_with_mask))
    p_without_mask = 1.0 - p_with_mask
    if max(p_with_mask, p_without_mask) < uncertain_below:
        status = MaskStatus.UNCERTAIN
    elif p_with_mask >= p_without_mask:
        status = MaskStatus.WITH_MASK
    else:
        status = MaskStatus.WITHOUT_MASK
    x1, y1, x2, y2 = box_xyxy
    return Face(x1, y1, x2, y2, min(1.0, max(0.0, score)), p_with_mask, p_without_mask, status)
