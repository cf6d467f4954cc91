"""How well tracks count visits: walkers whose ground truth is known, at several rates, by our tracker and by others.

The claim: what docs/schema.md says under "What tracks can and can't claim". Walkers are places in a room before a
camera, not pictures: faces are 0.22 m high, go at about 1.4 m/s, are missed at random, behind nearer heads and now and
then behind something else, and their boxes are off by a few percent. Every rate sees the same people. Figures are
counts and their ratios, the same on any machine; only the time per frame is this machine's.

    python -m benchmarks.tracking [--minutes 30] [--seed 7] [--others] [--json]

`--others` compares: the assignment with the least sum in place of the best pair first (SciPy, of the layer `train`),
and, where it is installed, ByteTrack of the library `trackers`, which Maskwatch doesn't need. Its settings are the best
of a sweep for each rate, on the very same people, while ours were chosen on others.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import click
import numpy as np

from common.domain import Face, MaskStatus
from workers.analysis import tracking

RATES = (1, 2, 5, 10)
#: People in view at a time, on average.
CROWDS = {"quiet": 0.7, "busy": 4.0}
#: Metres. The camera hangs at this height and looks down a little.
CAMERA_HEIGHT, PITCH = 2.4, math.radians(10)
WIDTH, HEIGHT, FOCAL_PX = 1920, 1080, 1400
FACE_WIDTH, FACE_HEIGHT = 0.16, 0.22
#: Smaller ones aren't found.
SMALLEST_PX = 20
#: Share of faces that a detector misses, a random one for each person.
MISSED = (0.05, 0.10)
#: Standard deviation of each edge of a box, as a share of its size.
JITTER = 0.03
#: How often something comes between, per person and second, and for how long, in seconds.
HIDDEN_PER_SECOND, HIDDEN_SECONDS = 0.05, (0.3, 1.2)


class Tracker(Protocol):
    """What is compared."""

    def update(self, faces: Sequence[Face], at_seconds: float) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Walker:
    """Someone's way: times, and places in metres (to the right, away from the camera), with straight lines between."""

    seconds: tuple[float, ...]
    right: tuple[float, ...]
    away: tuple[float, ...]
    height: float
    phase: float
    missed: float
    hidden: tuple[tuple[float, float], ...]

    def at(self, seconds: float) -> tuple[float, float, float] | None:
        """Right, up and away of the middle of the face, with the sway and bob of a step; None when not there."""
        if not self.seconds[0] <= seconds < self.seconds[-1]:
            return None
        step = 2 * math.pi * 0.9 * seconds + self.phase
        return (
            float(np.interp(seconds, self.seconds, self.right)) + 0.03 * math.sin(step),
            self.height + 0.02 * math.sin(2 * step),
            float(np.interp(seconds, self.seconds, self.away)),
        )


def towards(rng: np.random.Generator, start: float) -> list[tuple[float, float, float]]:
    """Along a corridor towards the camera, and out below it. (seconds, right, away) of each stop."""
    lane, speed = rng.uniform(-1.2, 1.2), rng.normal(1.4, 0.15)
    return [(start, lane, 13.0), (start + 11 / speed, lane + rng.normal(0, 0.3), 2.0)]


def across(rng: np.random.Generator, start: float) -> list[tuple[float, float, float]]:
    """From one side of the view to the other, at 4 to 8 m."""
    away, speed, side = rng.uniform(4, 8), rng.normal(1.4, 0.15), rng.choice([-1, 1])
    reach = 0.75 * away
    return [(start, -side * reach, away), (start + 2 * reach / speed, side * reach, away + rng.normal(0, 0.3))]


def standing(rng: np.random.Generator, start: float) -> list[tuple[float, float, float]]:
    """In from a side, stands for a while, on to the other side."""
    away, speed, side = rng.uniform(3, 7), rng.normal(1.4, 0.15), rng.choice([-1, 1])
    place, reach, stays = rng.uniform(-0.45, 0.45) * away, 0.75 * away, rng.uniform(5, 40)
    come = start + (place * side + reach) / speed
    return [
        (start, -side * reach, away),
        (come, place, away),
        (come + stays, place + rng.normal(0, 0.05), away),
        (come + stays + (reach - place * side) / speed, side * reach, away),
    ]


Way = Callable[[np.random.Generator, float], list[tuple[float, float, float]]]
SCENES: dict[str, tuple[Way, ...]] = {
    "towards the camera": (towards,),
    "across the view": (across,),
    "coming and standing": (standing,),
    "all of these": (towards, across, standing),
}


def people(ways: Sequence[Way], crowd: float, seconds: float, rng: np.random.Generator) -> list[Walker]:
    """Walkers who come at random times, so many that `crowd` of them are there at a time."""
    found: list[Walker] = []
    there = 0.0
    while there < crowd * seconds:
        stops = ways[len(found) % len(ways)](rng, float(rng.uniform(0, seconds)))
        begin, end = stops[0][0], stops[-1][0]
        hidden = []
        for _ in range(rng.poisson(HIDDEN_PER_SECOND * (end - begin))):
            since = rng.uniform(begin, end)
            hidden.append((since, since + rng.uniform(*HIDDEN_SECONDS)))
        found.append(
            Walker(
                seconds=tuple(float(stop[0]) for stop in stops),
                right=tuple(float(stop[1]) for stop in stops),
                away=tuple(float(stop[2]) for stop in stops),
                height=float(rng.normal(1.58, 0.08)),
                phase=float(rng.uniform(0, 2 * math.pi)),
                missed=float(rng.uniform(*MISSED)),
                hidden=tuple(hidden),
            )
        )
        there += end - begin
    return found


Box = tuple[float, float, float, float]
#: Of one frame: its time, its faces, and whose they are.
Frame = tuple[float, list[Face], list[int]]


def seen(walkers: Sequence[Walker], rate: float, seconds: float, rng: np.random.Generator) -> list[Frame]:
    """The faces that a detector would find, frame by frame."""
    frames = []
    for number in range(int(seconds * rate)):
        at = number / rate
        there = [
            (place[2], i, box) for i, w in enumerate(walkers) if (place := w.at(at)) and (box := projected(*place))
        ]
        faces, whose = [], []
        for away, i, box in sorted(there, reverse=True):
            walker = walkers[i]
            if (
                rng.random() < walker.missed
                or any(since <= at < until for since, until in walker.hidden)
                or any(other < away and covered(box, near) > 0.4 for other, _, near in there)
            ):
                continue
            faces.append(jittered(box, rng))
            whose.append(i)
        order = rng.permutation(len(faces))  # detectors sort by score, which says nothing of who it is
        frames.append((at, [faces[k] for k in order], [whose[k] for k in order]))
    return frames


def projected(right: float, up: float, away: float) -> Box | None:
    """The face's box in pixels, by a pinhole camera; None where it isn't whole in the picture, or too small."""
    down = CAMERA_HEIGHT - up
    depth = away * math.cos(PITCH) + down * math.sin(PITCH)
    if depth < 0.5:
        return None
    x = WIDTH / 2 + FOCAL_PX * right / depth
    y = HEIGHT / 2 + FOCAL_PX * (down * math.cos(PITCH) - away * math.sin(PITCH)) / depth
    w, h = FOCAL_PX * FACE_WIDTH / depth / 2, FOCAL_PX * FACE_HEIGHT / depth / 2
    whole = x - w >= 0 and x + w <= WIDTH and y - h >= 0 and y + h <= HEIGHT
    return (x - w, y - h, x + w, y + h) if whole and 2 * h >= SMALLEST_PX else None


def covered(box: Box, near: Box) -> float:
    """The share of a box that a nearer head covers; a head is half again as wide and high as its face."""
    w, h = (near[2] - near[0]) / 4, (near[3] - near[1]) / 4
    across = min(box[2], near[2] + w) - max(box[0], near[0] - w)
    down = min(box[3], near[3] + h) - max(box[1], near[1] - h)
    return max(0.0, across) * max(0.0, down) / ((box[2] - box[0]) * (box[3] - box[1]))


def jittered(box: Box, rng: np.random.Generator) -> Face:
    x1, y1, x2, y2 = np.array(box) + rng.normal(0, JITTER * (box[3] - box[1]), 4)
    return Face(float(x1), float(y1), float(x2), float(y2), 0.9, 0.5, 0.5, MaskStatus.UNCERTAIN)


@dataclass(slots=True)
class Counts:
    """What a tracker made of some frames; sums over scenes add up."""

    #: People of whom at least one face was found.
    visits: int = 0
    tracks: int = 0
    #: Visits that are one track, which is nobody else's.
    exact: int = 0
    #: Tracks beyond the first that somebody's faces are in.
    more: int = 0
    #: Tracks in which more than one person's faces are.
    mixed: int = 0
    #: How often somebody's track changes from one of their faces to the next.
    switches: int = 0
    faces: int = 0
    frames: int = 0
    took: float = 0.0

    def add(self, frames: Sequence[Frame], tracker: Tracker) -> None:
        tracks_of, people_of = defaultdict(set), defaultdict(set)
        last: dict[int, int] = {}
        for at, faces, whose in frames:
            before = time.perf_counter()
            ids = tracker.update(faces, at)
            self.took += time.perf_counter() - before
            assert len(ids) == len(faces) == len(set(ids))
            for person, track in zip(whose, ids, strict=True):
                self.switches += last.get(person, track) != track
                last[person] = track
                tracks_of[person].add(track)
                people_of[track].add(person)
            self.faces += len(faces)
        self.frames += len(frames)
        self.visits += len(tracks_of)
        self.tracks += len(people_of)
        self.more += sum(len(found) - 1 for found in tracks_of.values())
        self.mixed += sum(len(found) > 1 for found in people_of.values())
        self.exact += sum(len(found) == 1 and len(people_of[min(found)]) == 1 for found in tracks_of.values())

    def figures(self) -> dict[str, Any]:
        return {
            "visits": self.visits,
            "tracks": self.tracks,
            "ratio": self.tracks / self.visits,
            "exact": self.exact / self.visits,
            "more_per_visit": self.more / self.visits,
            "mixed": self.mixed / self.tracks,
            "switches_per_visit": self.switches / self.visits,
            "faces_per_visit": self.faces / self.visits,
            "ms_per_frame": 1000 * self.took / self.frames,
        }


@click.command()
@click.option("--minutes", default=30.0, show_default=True, help="How long each scene is watched.")
@click.option("--seed", default=7, show_default=True)
@click.option("--others", is_flag=True, help="Compare with other trackers.")
@click.option("--json", "as_json", is_flag=True)
def main(minutes: float, seed: int, others: bool, as_json: bool) -> None:
    """Count the visits of walkers whose ground truth is known by their tracks."""
    footage = {rate: list(scenes(rate, 60 * minutes, seed)) for rate in RATES}
    result: dict[str, Any] = {"minutes": minutes, "seed": seed, "rows": rows(footage)}
    if others:
        result["others"] = compared(footage)
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


def scenes(rate: int, seconds: float, seed: int) -> Iterator[tuple[str, str, list[Frame]]]:
    """Every scene with every crowd, as it is seen at this rate."""
    for s, (scene, ways) in enumerate(SCENES.items()):
        for c, (crowd, there) in enumerate(CROWDS.items()):
            walkers = people(ways, there, seconds, np.random.default_rng([seed, s, c]))
            yield scene, crowd, seen(walkers, rate, seconds, np.random.default_rng([seed, s, c, rate]))


Footage = dict[int, list[tuple[str, str, list[Frame]]]]


def rows(footage: Footage) -> list[dict[str, Any]]:
    """Our tracker's figures, scene by scene."""
    found = []
    for rate, scenes_at_rate in footage.items():
        for scene, crowd, frames in scenes_at_rate:
            counts = Counts()
            counts.add(frames, tracking.FaceTracker(rate))
            found.append({"rate": rate, "scene": scene, "crowd": crowd, **counts.figures()})
    return found


# --- others -----------------------------------------------------------------------------------------------


class LeastSum(tracking.FaceTracker):
    """Ours, but with the pairs whose misfits have the least sum."""

    def _pairs(self, sights: Sequence[tracking._Sight]) -> dict[int, tracking._Track]:
        from scipy.optimize import linear_sum_assignment

        never = 1e6
        costs = np.full((len(self._tracks), len(sights)), never)
        for t, track in enumerate(self._tracks):
            for i, sight in enumerate(sights):
                misfit = track.misfit(sight, self._frame_seconds)
                costs[t, i] = never if misfit is None else misfit
        return {
            int(i): self._tracks[t] for t, i in zip(*linear_sum_assignment(costs), strict=True) if costs[t, i] < never
        }


class ByteTrack:
    """The library's, with an id for every face: it has none for the first of a track, so the new tracks are named here.

    Boxes are compared by a kind of overlap that boxes apart have too: at these rates faces seldom overlap themselves.
    """

    #: Kind of overlap, and the least of it.
    SWEEP = (("giou", -0.9), ("giou", -0.8), ("giou", -0.7), ("giou", -0.4), ("biou", 0.1), ("biou", 0.2))

    def __init__(self, rate: float, overlap: str, least: float) -> None:
        import trackers

        self._tracker = trackers.ByteTrackTracker(
            lost_track_buffer=round(30 * max(tracking.LONGEST_GAP_SECONDS, 2 / rate)),  # counts in 1/30 s
            frame_rate=rate,
            track_activation_threshold=0.1,
            high_conf_det_threshold=0.1,
            minimum_consecutive_frames=1,
            minimum_iou_threshold=least,
            iou=trackers.GIoU() if overlap == "giou" else trackers.BIoU(6.0),
        )
        self._begun = 0

    def update(self, faces: Sequence[Face], at_seconds: float) -> list[int]:
        import supervision as sv

        boxes = np.array([(face.x1, face.y1, face.x2, face.y2) for face in faces], np.float32).reshape(-1, 4)
        places = np.arange(len(faces))
        sure = np.ones(len(faces), np.float32)
        found = self._tracker.update(sv.Detections(boxes, confidence=sure, class_id=places), timestamp=at_seconds)
        ids = [0] * len(faces)
        if len(faces):
            for i, number in zip(found.class_id, found.tracker_id, strict=True):
                ids[int(i)] = max(int(number), 0)
        new = [track for track in self._tracker.tracks if track.tracker_id == -1]
        for track, i in zip(new, [i for i, number in enumerate(ids) if not number], strict=True):
            self._begun += 1
            ids[i] = track.tracker_id = self._begun
        return ids


def compared(footage: Footage) -> list[dict[str, Any]]:
    """Each tracker's figures at each rate: means over the scenes. The library's best settings count."""
    makers: dict[str, list[Callable[[int], Tracker]]] = {
        "ours": [tracking.FaceTracker],
        "least sum": [LeastSum],
    }
    if find_spec("trackers") is not None:
        makers["ByteTrack"] = [
            lambda rate, overlap=overlap, least=least: ByteTrack(rate, overlap, least)  # type: ignore[misc]
            for overlap, least in ByteTrack.SWEEP
        ]
    found = []
    for name, tried in makers.items():
        for rate, scenes_at_rate in footage.items():
            best = max((mean(scenes_at_rate, make, rate) for make in tried), key=lambda figures: figures["exact"])
            found.append({"tracker": name, "rate": rate, **best})
    return found


def mean(
    scenes_at_rate: Sequence[tuple[str, str, list[Frame]]], make: Callable[[int], Tracker], rate: int
) -> dict[str, float]:
    every = []
    for _, _, frames in scenes_at_rate:
        counts = Counts()
        counts.add(frames, make(rate))
        every.append(counts.figures())
    return {name: float(np.mean([figures[name] for figures in every])) for name in every[0]}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    columns = "  ratio  exact  more/visit  mixed  switches/visit  ms/frame"
    text = [
        f"{result['minutes']:g} minutes of each scene; a visit is somebody of whom at least one face was found",
        f"per s  {'scene':<19}  crowd  visits  tracks{columns}",
    ]
    text += [
        f"{row['rate']:>5}  {row['scene']:<19}  {row['crowd']:<5}  {row['visits']:>6}  {row['tracks']:>6}{_cells(row)}"
        for row in result["rows"]
    ]
    if "others" in result:
        text += ["", f"per s  {'tracker':<9}{columns} (means over the scenes)"]
        others = sorted(result["others"], key=lambda row: row["rate"])
        text += [f"{row['rate']:>5}  {row['tracker']:<9}{_cells(row)}" for row in others]
    return text


def _cells(row: dict[str, Any]) -> str:
    return (
        f"  {row['ratio']:>5.2f}  {row['exact']:>5.0%}  {row['more_per_visit']:>10.2f}  {row['mixed']:>5.0%}"
        f"  {row['switches_per_visit']:>14.2f}  {row['ms_per_frame']:>8.3f}"
    )


if __name__ == "__main__":
    main()
