"""Makes the sample footage of the demo: images of three cameras and a video of a fourth, with known faces and masks.

`common/sample/people.py` draws the people and `common/sample/scenes.py` the places; this module decides who
stands where and when in the images, adds the effects of a camera (noise, JPEG), and writes the ground truth.
`common/sample/walkers.py` makes the video. Needs the layer `worker` (Pillow, NumPy, PyAV).
"""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.domain import Reason
from common.sample import people, walkers
from common.sample.compositing import FACE_SIZE_NATIVE, Person, caption, hides, paste, vignette
from common.sample.ground_truth import BadObject, GroundTruth, TrueCamera, TrueImage, TrueVideo
from common.sample.scenes import FILMED, SCENES, Scene

#: A Saturday and a Sunday; Berlin's clocks go from 02:00 to 03:00 on the Sunday.
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
#: When each filmed camera's video begins, on the first of the days.
FILM_TIME = time(10, 15)


def make_footage(out: Path, *, seed: int = 7, images_per_camera: int = 22, video: bool = True) -> GroundTruth:
    """Write images, a few bad objects, `truth.json` and, unless `video` is false, a video under the folder `out`.

    The same seed gives the same bytes. Keys are paths relative to `out/bucket`, for example
    `lobby/door/2026/03/28/09-15-00.jpg`, in local time. The ground truth has a `TrueImage` for every image, and
    for every second of a video.
    """
    bucket = out / "bucket"
    images = []
    for number, (location, camera) in enumerate(SCENES):
        # A generator per camera: more images of one camera leave the others as they are.
        rng = np.random.default_rng([seed, number])
        for local_time in schedule(rng, images_per_camera):
            images.append(_make_image(bucket, location, camera, local_time, rng))
    bad_objects = _make_bad_objects(bucket, images[0])
    videos = []
    for number, (location, camera) in enumerate(FILMED if video else ()):
        rng = np.random.default_rng([seed, len(SCENES) + number])
        film, frames = _make_video(bucket, location, camera, rng)
        videos.append(film)
        images += frames
        bad_objects.append(_make_bad_video(bucket, film))
    ground_truth = GroundTruth(seed, tuple(cameras()), tuple(images), tuple(bad_objects), tuple(videos))
    ground_truth.save(out / "truth.json")
    return ground_truth


def cameras() -> list[TrueCamera]:
    """The cameras of the footage."""
    return [
        TrueCamera(
            location,
            camera,
            TIME_ZONES[location],
            prefix=f"{location}/{camera}/",
            time_pattern=f"{location}/{camera}/%Y/%m/%d/%H-%M-%S.{suffix}",
        )
        for scenes, suffix in ((SCENES, "jpg"), (FILMED, "mp4"))
        for location, camera in scenes
    ]


def schedule(rng: np.random.Generator, count: int) -> list[datetime]:
    """`count` distinct naive local times in order, spread evenly over the hours of both days."""
    hours = [(day, hour) for day, hours in zip(DAYS, HOURS, strict=True) for hour in hours]
    times: set[datetime] = set()
    while len(times) < count:
        day, hour = hours[len(times) % len(hours)]
        times.add(datetime.combine(day, time(hour, int(rng.integers(60)), int(rng.integers(60)))))
    return sorted(times)


def _make_image(bucket: Path, location: str, camera: str, local_time: datetime, rng: np.random.Generator) -> TrueImage:
    scene = SCENES[location, camera]
    persons = _crowd(scene, location, local_time, rng)
    image = _empty(location, camera).copy()
    for person in persons:
        paste(image, person)
    image = _photographed(image, local_time, rng)
    caption(image, _title(location, camera, local_time))
    key = f"{location}/{camera}/{local_time:%Y/%m/%d/%H-%M-%S}.jpg"
    path = bucket / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_jpeg(image, quality=int(rng.integers(85, 93))))
    return TrueImage(
        key=key,
        location=location,
        camera=camera,
        local_time=local_time,
        observed_at=_instant(local_time, location),
        faces=tuple(person.face for person in persons),
    )


def _make_video(
    bucket: Path, location: str, camera: str, rng: np.random.Generator
) -> tuple[TrueVideo, list[TrueImage]]:
    start = datetime.combine(DAYS[0], FILM_TIME)
    key = f"{location}/{camera}/{start:%Y/%m/%d/%H-%M-%S}.mp4"
    path = bucket / key
    path.parent.mkdir(parents=True, exist_ok=True)

    def title(seconds: float) -> str:
        return _title(location, camera, start + timedelta(seconds=seconds))

    frames = []
    for shown in walkers.film(path, FILMED[location, camera], title, rng):
        local_time = start + timedelta(seconds=shown.offset_seconds)
        frames.append(
            TrueImage(
                key=key,
                location=location,
                camera=camera,
                local_time=local_time,
                observed_at=_instant(local_time, location),
                faces=shown.faces,
                offset_seconds=shown.offset_seconds,
                ignored=shown.ignored,
            )
        )
    return TrueVideo(key, walkers.SECONDS, walkers.FRAMES_PER_SECOND, walkers.VISITS), frames


def _title(location: str, camera: str, local_time: datetime) -> str:
    return f"{location} {camera}  {local_time:%Y-%m-%d %H:%M:%S}"


def _instant(local_time: datetime, location: str) -> datetime:
    return local_time.replace(tzinfo=ZoneInfo(TIME_ZONES[location])).astimezone(UTC)


@cache
def _empty(location: str, camera: str) -> Image.Image:
    return SCENES[location, camera].empty()


def _crowd(scene: Scene, location: str, local_time: datetime, rng: np.random.Generator) -> list[Person]:
    """One to six people, farthest first, every face in full view."""
    daytime = local_time.hour >= 6
    wanted = int(rng.integers(2, 7)) if daytime else int(rng.integers(1, 3))
    early, late = COMPLIANCE[location]
    share = early + (late - early) * min(1.0, max(0.0, (local_time.hour - 8) / 10))
    persons: list[Person] = []
    for _ in range(60 * wanted):
        if len(persons) == wanted:
            break
        person = _someone(scene, share, rng)
        if _in_view(person, scene) and all(_apart(person, other) for other in persons):
            persons.append(person)
    return sorted(persons, key=lambda person: person.scale)


def _someone(scene: Scene, mask_share: float, rng: np.random.Generator) -> Person:
    # Most faces are small, as they are in real footage: even on a logarithmic scale, 28 to 110 px, with a
    # few people right before the camera and a few far away.
    low, high = [(28, 110), (110, 200), (18, 24)][int(rng.choice(3, p=[0.87, 0.09, 0.04]))]
    scale = math.exp(rng.uniform(math.log(low), math.log(high))) / FACE_SIZE_NATIVE
    mask = people.MASK_STYLES[rng.integers(len(people.MASK_STYLES))] if rng.random() < mask_share else None
    appearance = people.Appearance(
        mask=mask,
        coat=people.COAT_COLOURS[rng.integers(len(people.COAT_COLOURS))],
        trousers=people.TROUSER_COLOURS[rng.integers(len(people.TROUSER_COLOURS))],
        flipped=bool(rng.random() < 0.5),
        gain=float(rng.uniform(0.85, 1.08)),
    )
    # The camera is at eye level: the eyes of a person on the floor are near the horizon at any distance.
    eyes = 100 * scale
    lift = rng.normal(0, HEIGHT_SPREAD) * people.FIGURE_SIZE[1] * scale
    # The floor is narrow at its far end.
    reach = 0.14 + 0.36 * min(1.0, scale * FACE_SIZE_NATIVE / 75)
    x = (0.5 + rng.uniform(-reach, reach)) * scene.width - people.FIGURE_SIZE[0] / 2 * scale
    return Person(
        appearance, x, scene.horizon * scene.height + 0.12 * people.FIGURE_SIZE[1] * scale - eyes + lift, scale
    )


def _in_view(person: Person, scene: Scene) -> bool:
    x1, y1, x2, y2 = person.placed(people.HEAD_BOX)
    return x1 >= 2 and y1 >= 34 and x2 <= scene.width - 2 and y2 <= scene.height - 2


def _apart(a: Person, b: Person) -> bool:
    near, far = (a, b) if a.scale >= b.scale else (b, a)
    return not hides(near, far, CLEARANCE)


def _photographed(image: Image.Image, local_time: datetime, rng: np.random.Generator) -> Image.Image:
    """Add the effects of light and camera: exposure by the time of day, darker corners, noise."""
    pixels: NDArray[np.float32] = np.asarray(image, np.float32)
    height, width = pixels.shape[:2]
    noon = 1 - min(1.0, abs(local_time.hour + local_time.minute / 60 - 13) / 12)
    exposure = 0.72 + 0.32 * noon + rng.normal(0, 0.02)
    tint = np.array([1.03, 1.0, 0.96] if noon < 0.6 else [1.0, 1.0, 1.01], np.float32)
    noise = rng.normal(0, 3.5, (height, width, 1)).astype(np.float32)
    lit = pixels * vignette(width, height).astype(np.float32) * np.float32(exposure) * tint + noise
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _make_bad_objects(bucket: Path, whole: TrueImage) -> list[BadObject]:
    """A few bad objects, as in every real bucket, so that a newcomer sees how Maskwatch treats them."""
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


def _make_bad_video(bucket: Path, whole: TrueVideo) -> BadObject:
    """A video cut off in the middle: an MP4 can't be opened without the index at its end."""
    content = (bucket / whole.key).read_bytes()
    key = f"{whole.key.rpartition('/')[0]}/10-50-00.mp4"
    (bucket / key).write_bytes(content[: len(content) // 2])
    return BadObject(key, Reason.UNREADABLE_VIDEO, "an MP4 cut off in its middle, before its index")
