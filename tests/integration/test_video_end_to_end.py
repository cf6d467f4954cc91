"""Videos end to end with real workers: killed in mid-chunk, delivered twice, with and without the fence."""

from __future__ import annotations

import io
import json
import math
import signal
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from sqlalchemy.orm import Session

from common.domain import JobRef
from common.messaging.queues import TaskName, encode_refs, send
from common.settings import get_settings
from producer import dispatch
from producer.submit import submit
from tests.ledger_rows import rows, scalar, states
from tests.mutants import UNFENCED, planted_in_processes
from tests.photos import portrait
from tests.services import QUICK, Bucket, Services, forget_settings, kill_tree, locate, maskwatch, running, wait_until
from tests.videos import make_video
from workers.summaries.aggregation import summarize

#: What a second of video takes to analyse must be long against a poll of the database, and short all the same.
FPS, SECONDS, CHUNK_SECONDS = 5, 8, 2


@lru_cache
def walking_by() -> bytes:
    """A face that moves through the picture from left to right."""
    face = portrait(96)

    def image(number: int) -> np.ndarray:  # type: ignore[type-arg]
        canvas = Image.new("RGB", (320, 192), (90, 110, 130))
        canvas.paste(face, (4 * number % 224, 48))
        return np.asarray(canvas)

    return make_video("mp4", frames=FPS * SECONDS, fps=FPS, size=(320, 192), gop=10, bframes=2, image=image)


@pytest.fixture
def quick(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short leases, ticks and chunks, for this process and the ones it starts."""
    settings = {
        **QUICK,
        "MASKWATCH_WORKER__CHUNK_SECONDS": str(CHUNK_SECONDS),
        "MASKWATCH_PIPELINE__SAMPLE_FPS": str(FPS),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    forget_settings()


#: What is stored of a video, without ids, which differ between two runs.
STORED = (
    "SELECT f.offset_seconds, f.x1, f.y1, f.x2, f.y2, f.p_face, f.p_with_mask, f.status, f.track_id"
    " FROM faces f JOIN media_objects m ON m.id = f.media_object_id WHERE m.key = :key ORDER BY 1, 2"
)
COUNTED = (
    "SELECT count(*), sum(c.frames), round(sum(c.seconds)::numeric, 6) FROM frame_counts c"
    " JOIN jobs j ON j.id = c.job_id JOIN media_objects m ON m.id = j.media_object_id WHERE m.key = :key"
)


def _drive(session: Session, what: str) -> None:
    """What a producer does, until all jobs have succeeded."""

    def done() -> bool:
        dispatch.reconcile(get_settings())
        dispatch.dispatch(get_settings())
        return set(states(session)) == {"succeeded"}

    wait_until(done, what=what)


def _killed_and_delivered_twice(session: Session, bucket: Bucket, folder: Path) -> None:
    """Analyse `a.mp4`: its worker dies by kill -9 in mid-chunk, and every message of its chunks comes again after all
    is done. Then `b.mp4`, the same bytes, without any of this; it is behind them in the queue."""
    locate()
    bucket.put("a.mp4", walking_by())
    submit(get_settings(), bucket.uri, location_name="lobby")
    settings = get_settings()
    dispatch.reconcile(settings)  # begins the epoch
    with running("worker", log=folder / "victim.log") as victim:
        dispatch.dispatch(settings)
        wait_until(lambda: states(session).get("pending", 0) == SECONDS // CHUNK_SECONDS, what="the plan")
        assert dispatch.dispatch(settings) == SECONDS // CHUNK_SECONDS
        sent = rows(session, "SELECT id, token FROM jobs WHERE state = 'queued'")
        wait_until(
            lambda: states(session).get("succeeded", 0) >= 2 and states(session).get("running", 0) == 1,
            what="a chunk in hand after one that is done",
        )
        kill_tree(victim, signal.SIGKILL)
    assert states(session).get("running", 0) == 1
    with running("worker", log=folder / "worker.log"):
        _drive(session, what="the rest, by another worker")
        for row in sent:
            send(TaskName.ANALYZE, [encode_refs([JobRef(row.id, row.token)])])
        bucket.put("b.mp4", walking_by())
        submit(get_settings(), bucket.uri, location_name="lobby")
        _drive(session, what="the undisturbed video")
    summarize()


def test_after_kill_9_and_a_second_delivery_the_rows_are_those_of_an_undisturbed_run(
    quick: None, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    _killed_and_delivered_twice(session, bucket, tmp_path)
    assert set(states(session)) == {"succeeded"}
    disturbed, undisturbed = (rows(session, STORED, key=key) for key in ("a.mp4", "b.mp4"))
    assert disturbed == undisturbed and len(undisturbed) >= FPS * SECONDS * 0.9
    (chunks, frames, seconds), same = rows(session, COUNTED, key="a.mp4")[0], rows(session, COUNTED, key="b.mp4")[0]
    assert (chunks, frames, float(seconds)) == (SECONDS // CHUNK_SECONDS, FPS * SECONDS, SECONDS)
    assert (chunks, frames, seconds) == same
    assert scalar(session, "SELECT sum(faces) FROM compliance_hourly") == len(disturbed) + len(undisturbed)
    assert scalar(session, "SELECT count(*) FROM job_attempts WHERE outcome IN ('lease_expired', 'crashed')") == 1


@pytest.mark.chaos
def test_without_the_fence_frames_are_counted_twice(
    quick: None, session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted_in_processes(tmp_path / "unfenced", *UNFENCED) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        _killed_and_delivered_twice(session, bucket, tmp_path)
    disturbed, undisturbed = (rows(session, STORED, key=key) for key in ("a.mp4", "b.mp4"))
    assert len(disturbed) > len(undisturbed)
    assert rows(session, COUNTED, key="a.mp4")[0][1] > FPS * SECONDS


def test_run_takes_images_and_videos_together(quick: None, session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "footage"
    folder.mkdir()
    (folder / "walk.mp4").write_bytes(walking_by())
    (folder / "cut.mp4").write_bytes(walking_by()[:-2000])
    animation = io.BytesIO()
    still = [portrait(128).convert("P"), Image.new("P", (128, 128), 40)]
    still[0].save(animation, "GIF", save_all=True, append_images=still[1:], duration=1000)
    (folder / "two.gif").write_bytes(animation.getvalue())
    portrait(160).save(folder / "one.png")
    done = maskwatch(
        "run", str(folder), "--location", "street", "--sample-fps", "2", "--workers", "1", "--json", "--time-pattern",
        "*.mp4",
    )  # fmt: skip
    assert done.returncode == 1 and "must hold a date" in done.stderr
    done = maskwatch("run", str(folder), "--location", "street", "--sample-fps", "2", "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["listed"], report["new"], report["others"]) == (4, 4, 0)
    assert [entry["reason"] for entry in report["quarantined_objects"]] == ["unreadable_video"]
    kinds = "SELECT kind, state, count(*) FROM jobs GROUP BY 1, 2 ORDER BY 1, 2"
    assert rows(session, kinds) == [
        ("chunk", "succeeded", SECONDS // CHUNK_SECONDS + 1),
        ("image", "succeeded", 1),
        ("probe", "quarantined", 1),
        ("probe", "succeeded", 2),
    ]
    assert rows(session, "SELECT DISTINCT spec ->> 'sample_fps' FROM pipelines") == [("2.0",)]
    frames = sum(row["frames"] for row in report["summary"])
    assert frames == 2 * SECONDS + 2 + 1


def test_a_shared_video_is_analysed(services: Services, session: Session, data_dir: Path, tmp_path: Path) -> None:
    """Of them the animation of faces that turn; all three, with a film of two minutes, take half a minute more."""
    source = next((data_dir / "video").glob("head-pose*.gif"))
    done = maskwatch("run", str(source), "--location", "street", "--sample-fps", "2", "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    (day,) = json.loads(done.stdout)["summary"]
    with av.open(str(source)) as film:
        assert film.duration is not None
        assert day["frames"] == math.ceil(2 * film.duration / av.time_base)
    assert day["faces"] > 10
    assert scalar(session, "SELECT count(DISTINCT (job_id, track_id)) FROM faces") < day["faces"]
