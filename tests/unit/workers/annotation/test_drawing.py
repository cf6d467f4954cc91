"""Drawing: the right colours in the right place, at every size, without touching the original."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.domain import Face, MaskStatus
from tests.photos import portrait
from workers.annotation.drawing import BLUR_MARGIN, COLOURS, LEGIBLE_PX, blur_faces, draw_faces, enlarge_for_labels


def face(box: tuple[float, float, float, float], status: MaskStatus = MaskStatus.WITH_MASK, p: float = 0.97) -> Face:
    return Face(*box, 0.9, p, 1 - p, status)


@pytest.mark.parametrize("status", MaskStatus)
@pytest.mark.parametrize("scale", [1, 4])
def test_the_box_has_the_colour_of_the_status(status: MaskStatus, scale: int) -> None:
    image = np.full((300 * scale, 400 * scale, 3), 127, np.uint8)
    drawn = draw_faces(image, [face((100 * scale, 100 * scale, 200 * scale, 220 * scale), status)])
    for y, x in ((160, 100), (160, 200), (220, 150)):  # left, right and lower edge
        assert tuple(drawn[y * scale, x * scale]) == COLOURS[status]
    assert (drawn[130 * scale : 210 * scale, 110 * scale : 190 * scale] == 127).all()  # the face stays visible
    assert (image == 127).all()


def test_the_colours_are_green_red_and_amber() -> None:
    assert np.argmax(COLOURS[MaskStatus.WITH_MASK]) == 1
    assert np.argmax(COLOURS[MaskStatus.WITHOUT_MASK]) == 0
    red, green, blue = COLOURS[MaskStatus.UNCERTAIN]
    assert red > green > 100 > blue


def test_the_label_is_above_the_box_and_tells_the_probability() -> None:
    image = np.full((800, 1000, 3), 127, np.uint8)
    one = draw_faces(image, [face((300, 300, 500, 500), p=0.97)])
    other = draw_faces(image, [face((300, 300, 500, 500), p=0.62)])
    label = (slice(260, 298), slice(300, 600))
    assert (one[label] != 127).any()
    changed = np.argwhere((one != other).any(axis=2))
    assert changed.size  # the two differ in the number, and only there
    assert changed[:, 0].max() < 300
    assert changed[:, 1].min() > 390


def test_at_the_upper_edge_the_label_stays_inside() -> None:
    image = np.full((800, 1000, 3), 127, np.uint8)
    drawn = draw_faces(image, [face((300, 0, 500, 200))])
    assert (drawn[5:30, 310:490] != 127).any()


def test_a_small_face_shows_the_number_alone() -> None:
    image = np.full((800, 1000, 3), 127, np.uint8)
    small = draw_faces(image, [face((300, 300, 320, 325))])
    columns = np.argwhere((small != 127).any(axis=2))[:, 1]
    assert columns.max() - columns.min() < 80


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_any_face_can_be_drawn_on_any_image(width: int, height: int, data: st.DataObject) -> None:
    x1, y1 = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    x2, y2 = data.draw(st.floats(x1 + 0.1, width + 0.5)), data.draw(st.floats(y1 + 0.1, height + 0.5))
    box = (x1, y1, min(x2, width), min(y2, height))
    image = np.zeros((height, width, 3), np.uint8)
    drawn = draw_faces(image, [face(box, data.draw(st.sampled_from(MaskStatus)))])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert drawn.any()


def test_a_small_image_is_enlarged_with_its_faces() -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:150, 200:260] = 255
    larger, (moved,) = enlarge_for_labels(image, [face((200, 100, 260, 150))])
    assert larger.shape == (900, 1200, 3)
    assert (moved.x1, moved.y1, moved.x2, moved.y2) == (600, 300, 780, 450)
    assert larger[305:445, 605:775].min() > 200


def test_a_large_image_stays() -> None:
    image = np.zeros((10, LEGIBLE_PX, 3), np.uint8)
    same, faces = enlarge_for_labels(image, [face((1, 1, 5, 5))])
    assert same is image
    assert faces == [face((1, 1, 5, 5))]


def test_the_meant_face_has_a_wider_box_with_a_rim_and_lies_on_top() -> None:
    image = np.full((300, 400, 3), 127, np.uint8)
    same = (100, 100, 200, 220)
    faces = [face(same, MaskStatus.WITHOUT_MASK), face(same, MaskStatus.WITH_MASK)]
    drawn = draw_faces(image, faces, emphasised=0)
    assert tuple(drawn[160, 100]) == tuple(drawn[160, 102]) == COLOURS[MaskStatus.WITHOUT_MASK]
    assert tuple(drawn[160, 97]) == tuple(drawn[160, 103]) == (255, 255, 255)
    assert (drawn[160, 110:190] == 127).all()


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two grey pictures without what is coarse in them: 1 for the same face, about 0 for none."""
    fine = []
    for image in (a, b):
        grey = image.astype(float).mean(axis=2)
        side = max(3, min(grey.shape) // 3)
        fine.append((grey - cv2.blur(grey, (side, side), borderType=cv2.BORDER_REFLECT)).ravel())
    return float(np.corrcoef(*fine)[0, 1])


@pytest.mark.parametrize("width", [24, 64, 256, 1024, 2000])
def test_a_hidden_face_can_not_be_recognised_whatever_its_size(width: int) -> None:
    # Where the face is in the photograph, as a share of its width.
    x1, y1, x2, y2 = (round(share * width) for share in (0.36, 0.12, 0.52, 0.37))
    image = np.asarray(portrait(width))
    hidden = blur_faces(image, [face((x1, y1, x2, y2))])
    inside = (slice(y1, y2), slice(x1, x2))
    assert likeness(image[inside], hidden[inside]) < 0.3
    assert len(np.unique(hidden[inside].reshape(-1, 3), axis=0)) <= 20
    across, down = BLUR_MARGIN * (x2 - x1), BLUR_MARGIN * (y2 - y1)
    changed = np.argwhere((image != hidden).any(axis=2))
    assert (changed.min(axis=0) >= np.floor([y1 - down, x1 - across])).all()
    assert (changed.max(axis=0) <= np.ceil([y2 + down, x2 + across])).all()
    # The surroundings are hidden, too.
    assert (image[y1 - max(1, int(down / 2)), x1:x2] != hidden[y1 - max(1, int(down / 2)), x1:x2]).any()


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_any_face_can_be_hidden_on_any_image(width: int, height: int, data: st.DataObject) -> None:
    x1, y1 = data.draw(st.floats(0, width - 0.5)), data.draw(st.floats(0, height - 0.5))
    x2, y2 = data.draw(st.floats(x1 + 0.1, width + 0.5)), data.draw(st.floats(y1 + 0.1, height + 0.5))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    before = image.copy()
    hidden = blur_faces(image, [face((x1, y1, min(x2, width), min(y2, height)))])
    assert (image == before).all()
    assert hidden.shape == image.shape
    assert hidden.dtype == np.uint8
