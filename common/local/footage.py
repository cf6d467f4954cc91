"""Makes the sample footage of the demo: pictures of three cameras whose faces and masks are known.

`common/local/people.py` draws the people and `common/local/scenes.py` the places; this module decides who
stands where and when, adds what a camera adds (noise, JPEG), and writes the truth beside the pictures.
Needs the layers `local` (scikit-image) and `worker` (Pillow, NumPy).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import cache
from io import BytesIO
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.domain import MaskStatus, Reason
from common.local import people
from common.local.scenes import SCENES, Scene
from common.local.truth import BadObject, Box, TrueCamera, TrueFace, TruePicture, Truth

#: Saturday and Sunday; Berlin's clocks go from 02:00 to 03:00 on the second.
DAYS = (date(2026, 3, 28), date(2026, 3, 29))
TIME_ZONES = {"lobby": "Europe/Berlin", "market-street": "Asia/Kolkata"}
#: Hours with footage, by day; the two in the night lie around the change of Berlin's clocks.
HOURS = ((8, 9, 11, 13, 16, 18), (1, 3, 9, 11, 14, 17))
#: Share of people with a mask at 8 and at 18 o'clock; between them it changes evenly.
COMPLIANCE = {"lobby": (0.92, 0.55), "market-street": (0.3, 0.65)}
#: The standing height of a person's eyes over the horizon line varies by this share of their height.
HEIGHT_SPREAD = 0.035
#: A figure's face keeps clear of everyone nearer by this share of the face's own size.
CLEARANCE = 0.3

FACE_SIZE_NATIVE = max(people.FACE_BOX[2] - people.FACE_BOX[0], people.FACE_BOX[3] - people.FACE_BOX[1])


@dataclass(frozen=True, slots=True)
class _Person:
    """Someone in a picture: the figure's top left corner and scale in pixels of the picture."""

    look: people.Look
    x: float
    y: float
    scale: float

    def placed(self, box: Box) -> Box:
        """A box of the figure as a box of the picture."""
        if self.look.flipped:
            box = people.flipped_box(box)
        return (
            self.x + box[0] * self.scale, self.y + box[1] * self.scale,
            self.x + box[2] * self.scale, self.y + box[3] * self.scale,
        )  # fmt: skip

    @property
    def face(self) -> TrueFace:
        label = MaskStatus.WITHOUT_MASK if self.look.mask is None else MaskStatus.WITH_MASK
        box = self.placed(people.FACE_BOX)
        return TrueFace((round(box[0], 1), round(box[1], 1), round(box[2], 1), round(box[3], 1)), label)


def make_footage(out: Path, *, seed: int = 7, images_per_camera: int = 22) -> Truth:
    """Write the pictures, a few bad objects and `truth.json` under the folder `out`; the same for the same seed.

    Keys are paths relative to `out/bucket`, for example `lobby/door/2026/03/28/09-15-00.jpg`, in local time.
    """
    bucket = out / "bucket"
    pictures = []
    for number, (location, camera) in enumerate(SCENES):
        # A generator per camera: more images of one camera leave the others as they are.
        rng = np.random.default_rng([seed, number])
        for local_time in schedule(rng, images_per_camera):
            pictures.append(_make_picture(bucket, location, camera, local_time, rng))
    bad_objects = _make_bad_objects(bucket, pictures[0])
    truth = Truth(seed, tuple(cameras()), tuple(pictures), tuple(bad_objects))
    truth.save(out / "truth.json")
    return truth


def cameras() -> list[TrueCamera]:
    """The cameras of the footage."""
    return [
        TrueCamera(
            location,
            camera,
            TIME_ZONES[location],
            prefix=f"{location}/{camera}/",
            time_pattern=f"{location}/{camera}/%Y/%m/%d/%H-%M-%S.jpg",
        )
        for location, camera in SCENES
    ]


def schedule(rng: np.random.Generator, count: int) -> list[datetime]:
    """`count` distinct naive local times in order, spread evenly over the hours of both days."""
    hours = [(day, hour) for day, hours in zip(DAYS, HOURS, strict=True) for hour in hours]
    times: set[datetime] = set()
    while len(times) < count:
        day, hour = hours[len(times) % len(hours)]
        times.add(datetime.combine(day, time(hour, int(rng.integers(60)), int(rng.integers(60)))))
    return sorted(times)


def _make_picture(
    bucket: Path, location: str, camera: str, local_time: datetime, rng: np.random.Generator
) -> TruePicture:
    scene = SCENES[location, camera]
    persons = _crowd(scene, location, local_time, rng)
    image = _empty(location, camera).copy()
    for person in persons:
        _paste(image, person)
    image = _photographed(image, local_time, rng)
    _caption(image, f"{location} {camera}  {local_time:%Y-%m-%d %H:%M:%S}")
    key = f"{location}/{camera}/{local_time:%Y/%m/%d/%H-%M-%S}.jpg"
    path = bucket / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_jpeg(image, quality=int(rng.integers(85, 93))))
    return TruePicture(
        key=key,
        location=location,
        camera=camera,
        local_time=local_time,
        observed_at=local_time.replace(tzinfo=ZoneInfo(TIME_ZONES[location])).astimezone(UTC),
        faces=tuple(person.face for person in persons),
    )


@cache
def _empty(location: str, camera: str) -> Image.Image:
    return SCENES[location, camera].empty()


def _crowd(scene: Scene, location: str, local_time: datetime, rng: np.random.Generator) -> list[_Person]:
    """One to six people, farthest first, every face in full view."""
    daytime = local_time.hour >= 6
    wanted = int(rng.integers(2, 7)) if daytime else int(rng.integers(1, 3))
    early, late = COMPLIANCE[location]
    share = early + (late - early) * min(1.0, max(0.0, (local_time.hour - 8) / 10))
    persons: list[_Person] = []
    for _ in range(60 * wanted):
        if len(persons) == wanted:
            break
        person = _someone(scene, share, rng)
        if _in_view(person, scene) and all(_apart(person, other) for other in persons):
            persons.append(person)
    return sorted(persons, key=lambda person: person.scale)


def _someone(scene: Scene, mask_share: float, rng: np.random.Generator) -> _Person:
    # Most faces are small, as they are in real footage: even on a logarithmic scale, 28 to 110 px, with a
    # few people right before the camera and a few far away.
    low, high = [(28, 110), (110, 200), (18, 24)][int(rng.choice(3, p=[0.87, 0.09, 0.04]))]
    scale = math.exp(rng.uniform(math.log(low), math.log(high))) / FACE_SIZE_NATIVE
    mask = people.MASK_STYLES[rng.integers(len(people.MASK_STYLES))] if rng.random() < mask_share else None
    look = people.Look(
        mask=mask,
        coat=people.COAT_COLOURS[rng.integers(len(people.COAT_COLOURS))],
        trousers=people.TROUSER_COLOURS[rng.integers(len(people.TROUSER_COLOURS))],
        flipped=bool(rng.random() < 0.5),
        gain=float(rng.uniform(0.85, 1.08)),
    )
    # A camera at eye level: whoever stands on the floor has their eyes near the horizon, near or far.
    eyes = 100 * scale
    lift = rng.normal(0, HEIGHT_SPREAD) * people.FIGURE_SIZE[1] * scale
    # The floor is narrow at its far end.
    reach = 0.14 + 0.36 * min(1.0, scale * FACE_SIZE_NATIVE / 75)
    x = (0.5 + rng.uniform(-reach, reach)) * scene.width - people.FIGURE_SIZE[0] / 2 * scale
    return _Person(look, x, scene.horizon * scene.height + 0.12 * people.FIGURE_SIZE[1] * scale - eyes + lift, scale)


def _in_view(person: _Person, scene: Scene) -> bool:
    x1, y1, x2, y2 = person.placed(people.HEAD_BOX)
    return x1 >= 2 and y1 >= 34 and x2 <= scene.width - 2 and y2 <= scene.height - 2


def _apart(a: _Person, b: _Person) -> bool:
    """Whether the farther one's face is hidden by nothing of the nearer one."""
    near, far = (a, b) if a.scale >= b.scale else (b, a)
    face = far.placed(people.FACE_BOX)
    margin = CLEARANCE * (face[3] - face[1])
    grown = (face[0] - margin, face[1] - margin, face[2] + margin, face[3] + margin)
    body = (15.0, 145.0, 380.0, float(people.FIGURE_SIZE[1]))
    return not (_meet(grown, near.placed(people.HEAD_BOX)) or _meet(grown, near.placed(body)))


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _paste(image: Image.Image, person: _Person) -> None:
    # Sampled at the exact fraction of a pixel, so that the box of its face is exact too.
    left, top = math.floor(person.x), math.floor(person.y)
    inverse = 1 / person.scale
    width, height = (math.ceil(side * person.scale) + 1 for side in people.FIGURE_SIZE)
    shift_x, shift_y = (person.x - left) * inverse, (person.y - top) * inverse
    box = (-shift_x, -shift_y, width * inverse - shift_x, height * inverse - shift_y)
    pad = math.ceil(inverse) + 2
    figure = people.figure(person.look)
    padded = Image.new("RGBA", (figure.width + 2 * pad, figure.height + 2 * pad))
    padded.paste(figure, (pad, pad))
    visible = (box[0] + pad, box[1] + pad, min(box[2] + pad, padded.width), min(box[3] + pad, padded.height))
    size = (round((visible[2] - visible[0]) / inverse), round((visible[3] - visible[1]) / inverse))
    resized = padded.resize(size, Image.Resampling.LANCZOS, box=visible)
    image.paste(resized, (left, top), resized)


def _photographed(image: Image.Image, local_time: datetime, rng: np.random.Generator) -> Image.Image:
    """What light and camera add: exposure by the time of day, darker corners, noise."""
    pixels: NDArray[np.float32] = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    noon = 1 - min(1.0, abs(local_time.hour + local_time.minute / 60 - 13) / 12)
    exposure = 0.72 + 0.32 * noon + rng.normal(0, 0.02)
    tint = np.array([1.03, 1.0, 0.96] if noon < 0.6 else [1.0, 1.0, 1.01], np.float32)
    rows, columns = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = (1 - 0.13 * (rows**2 + columns**2) / 2).astype(np.float32)[..., None]
    noise = rng.normal(0, 3.5, (height, width, 1)).astype(np.float32)
    lit = pixels * vignette * np.float32(exposure) * tint + noise
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def _caption(image: Image.Image, words: str) -> None:
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    draw.rectangle((0, 0, 14 + draw.textlength(words, font), 26), fill=(18, 18, 20))
    draw.text((7, 4), words, font=font, fill=(230, 230, 226))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _make_bad_objects(bucket: Path, whole: TruePicture) -> list[BadObject]:
    """A few objects such as every real bucket has, so that a newcomer sees what becomes of them."""
    folder = f"{whole.location}/{whole.camera}/{DAYS[0]:%Y/%m/%d}"
    contents = {
        f"{folder}/12-40-00.jpg": (bucket / whole.key).read_bytes()[:20_000],
        f"{folder}/12-41-00.jpg": b"",
        f"{whole.location}/{whole.camera}/notes.txt": b"Lens cleaned on Friday.\n",
    }
    for key, content in contents.items():
        (bucket / key).write_bytes(content)
    truncated, empty, notes = contents
    return [
        BadObject(truncated, Reason.TRUNCATED_IMAGE, "a JPEG cut off after 20,000 bytes"),
        BadObject(empty, Reason.EMPTY_FILE, "an object of 0 bytes"),
        BadObject(notes, None, "not a picture: counted and named, no job"),
    ]
