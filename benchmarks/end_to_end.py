"""What the whole system costs, end to end: the same images through it and through a plain loop, in one run.

The claim: at most 15 % more CPU time, of all processes (Postgres, Redis and the S3 server included), than a
loop that reads, decodes, detects and classifies. Both sides are warm: models loaded, first pictures done.

    python -m benchmarks.end_to_end [--images 200] [--rounds 3] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil

from common.models.pipeline import pipeline_spec

BUCKET = "benchmark"


@click.command()
@click.option("--images", default=200, show_default=True, help="Pictures per round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; the median counts.")
@click.option("--workers", default=2, show_default=True, help="Worker processes; they share the cores.")
@click.option("--json", "as_json", is_flag=True)
def main(images: int, rounds: int, workers: int, as_json: bool) -> None:
    """Compare the whole system, end to end, with a plain loop over the same images."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        del os.environ[name]
    try:
        result = measure(folder, images, rounds, workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"pictures per round   {images}, {rounds} rounds; {workers} workers share the cores, the loop has 1 thread")
    print(f"plain loop           {result['loop_cpu_ms']:.1f} ms CPU per picture, {result['loop_per_s']:.1f} pictures/s")
    cpu_ms, per_s = result["end_to_end_cpu_ms"], result["end_to_end_per_s"]
    print(f"end to end           {cpu_ms:.1f} ms CPU per picture, {per_s:.1f} pictures/s")
    print(f"end to end / loop    {result['cpu_ratio']:.3f} of the CPU time (the claim: at most 1.15)")
    for name, value in result["end_to_end_cpu_ms_by_part"].items():
        print(f"  {name:<18} {value:.1f} ms CPU per picture")
    print(f"largest worker       {result['worker_rss_mb']:.0f} MB resident, its child included (the claim: 900)")


def measure(folder: Path, images: int, rounds: int, workers: int) -> dict:  # type: ignore[type-arg]
    from common.cli.parts.deployment import deployment
    from common.cli.processes import work_processes
    from common.local.stack import LocalStack

    with deployment() as settings:
        stack = LocalStack(settings.state_dir)
        services = {service.name: service.pid for service in stack.status()}
        prefixes = upload(folder, settings.storage.endpoint_url, images, rounds)
        with work_processes(workers, state_dir=settings.state_dir) as pids:
            parts = {"producer": pids[:1], "aggregator": pids[1:2], "workers": pids[2:]}
            parts |= {name: [pid] for name, pid in services.items() if pid is not None}
            enqueue_and_wait("warm-up/")
            through_a_loop("warm-up/", services["s3"])
            whole, loop = [], []
            # In turn, so that whatever else the machine does weighs on both.
            for prefix in prefixes:
                whole.append(through_everything(prefix, parts))
                loop.append(through_a_loop(prefix, services["s3"]))
            resident = max(sum(p.memory_info().rss for p in family(pid)) for pid in pids[2:])
    ratios = [r["total"] / single["cpu"] for r, single in zip(whole, loop, strict=True)]
    middle = sorted(range(rounds), key=ratios.__getitem__)[rounds // 2]
    return {
        "images": images,
        "rounds": rounds,
        "workers": workers,
        "cpu_ratio": statistics.median(ratios),
        "cpu_ratios": ratios,
        "loop_cpu_ms": 1000 * loop[middle]["cpu"] / images,
        "end_to_end_cpu_ms": 1000 * whole[middle]["total"] / images,
        "loop_per_s": images / loop[middle]["wall"],
        "end_to_end_per_s": images / whole[middle]["wall"],
        "end_to_end_cpu_ms_by_part": {
            n: 1000 * v / images for n, v in whole[middle].items() if n not in ("total", "wall")
        },
        "worker_rss_mb": resident / 2**20,
    }


def upload(folder: Path, endpoint_url: str | None, images: int, rounds: int) -> list[str]:
    """Sample footage, a prefix per round, and a few to warm up; returns the rounds' prefixes."""
    import boto3

    from common.sample.footage import make_footage

    make_footage(folder / "footage", video=False)
    files = [path.read_bytes() for path in sorted((folder / "footage" / "bucket").rglob("*.jpg"))]
    files = [content for content in files if content.endswith(b"\xff\xd9")]  # whole pictures only
    client = boto3.client("s3", endpoint_url=endpoint_url)
    client.create_bucket(Bucket=BUCKET)
    prefixes = [f"round-{number}/" for number in range(rounds)]
    for prefix, count in [("warm-up/", 32), *((prefix, images) for prefix in prefixes)]:
        for number in range(count):
            client.put_object(Bucket=BUCKET, Key=f"{prefix}{number:05}.jpg", Body=files[number % len(files)])
    return prefixes


def enqueue_and_wait(prefix: str) -> None:
    from common.catalog import places
    from common.cli.parts.waiting import wait_for
    from common.database.sessions import session_scope
    from common.settings import get_settings
    from producer.cli.listing import nudge
    from producer.submit import submit

    with session_scope() as session:
        places.add_location(session, "benchmark", "UTC")
    submit(get_settings(), f"s3://{BUCKET}/{prefix}", location_name="benchmark")
    nudge()
    wait_for(get_settings())


def through_everything(prefix: str, parts: dict[str, list[int]]) -> dict[str, float]:
    """CPU seconds by part, their total, and the wall time, of one round through the whole system."""
    with cpu_of(parts) as spent:
        before = time.process_time()
        started = time.perf_counter()
        enqueue_and_wait(prefix)
        wall = time.perf_counter() - started
        # Only this process: the processes that it started are counted above.
        enqueueing = time.process_time() - before
    spent["enqueueing"] = enqueueing
    return {**spent, "total": sum(spent.values()), "wall": wall}


def through_a_loop(prefix: str, s3: int | None) -> dict[str, float]:
    """CPU seconds (of the S3 server, too) and wall time of one round in a plain loop with one thread."""
    from common.settings import get_settings
    from common.storage.opening import open_source
    from workers.analysis.load import load_analyzer
    from workers.inference import Runtime
    from workers.media.images import decode_image

    settings = get_settings()
    analyzer = load_analyzer(pipeline_spec(settings), Runtime(threads=1))
    store, below = open_source(f"s3://{BUCKET}/{prefix}", settings)
    with cpu_of({"s3": [s3] if s3 else []}) as spent:
        before, started = time.process_time(), time.perf_counter()
        for page in store.list_pages(below):
            for info in page:
                data = store.read(info.key, info.etag, settings.storage.max_object_bytes)
                analyzer.analyze(decode_image(data, max_pixels=settings.worker.max_image_pixels).rgb)
        wall, own = time.perf_counter() - started, time.process_time() - before
    return {"cpu": own + spent["s3"], "wall": wall}


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@contextmanager
def cpu_of(parts: dict[str, list[int]]) -> Iterator[dict[str, float]]:
    """CPU seconds (user and system) that processes and their descendants spend inside the block, by part.

    Reaped children are counted through their parent, such as the backends of Postgres that have ended.
    """

    def now() -> dict[str, float]:
        return {name: sum(seconds(pid) for pid in pids) for name, pids in parts.items()}

    def seconds(pid: int) -> float:
        own = psutil.Process(pid).cpu_times()
        return (
            own.children_user
            + own.children_system
            + sum(t.user + t.system for t in (process.cpu_times() for process in family(pid)))
        )

    before = now()
    spent: dict[str, float] = {}
    yield spent
    after = now()
    spent.update({name: after[name] - before[name] for name in parts})


if __name__ == "__main__":
    main()
