"""How quickly an archive gets into the ledger: from a lister that costs nothing to rows in `jobs`.

The claims: at least 10,000 objects per second on two cores, Postgres included, and memory that does not grow with the
archive: at most 10 % from 100,000 objects to 2 million.

    python -m benchmarks.discover [--objects 100000 --objects 2000000] [--threads 4] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from common.domain import ObjectInfo

FOLDERS = 64
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
PATTERN = "cam*/%Y/%m/%d/%H-%M-%S.jpg"


class SyntheticStore:
    """A bucket that holds a picture a second from each of 64 cameras, and lists it at no cost."""

    def __init__(self, bucket: str, objects: int) -> None:
        self.bucket = bucket
        self._per_folder = objects // FOLDERS

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        return [f"cam{folder:02}/" for folder in range(FOLDERS)]

    def list_pages(self, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        first = int(start_after[3:5]) if start_after else 0
        for folder in range(first, FOLDERS):
            page = []
            for number in range(self._per_folder):
                moment = BEGIN + timedelta(seconds=number)
                key = f"cam{folder:02}/{moment:%Y/%m/%d/%H-%M-%S}.jpg"
                page.append(ObjectInfo(self.bucket, key, f"{folder:02x}{number:030x}", 50_000, moment))
                if len(page) == 1000:
                    yield page
                    page = []
            if page:
                yield page


def one(bucket: str, objects: int, threads: int) -> None:
    """Register one archive and print what it took: the part that has a process of its own."""
    from common.catalog import places
    from common.database.sessions import session_scope
    from common.settings import get_settings
    from producer import submit

    store = SyntheticStore(bucket, objects)
    began = time.process_time()
    count = sum(len(page) for page in store.list_pages(""))
    listing = time.process_time() - began
    submit.open_source = lambda source, settings: (store, "")  # type: ignore[assignment]
    with session_scope() as session:
        places.add_location(session, bucket, "Europe/Berlin")
    cpu, wall = time.process_time(), time.perf_counter()
    report = submit.submit(get_settings(), bucket, location_name=bucket, time_pattern=PATTERN, threads=threads)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert report.new == report.listed == count, report
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(
        json.dumps(
            {
                "objects": count,
                "threads": threads,
                "seconds": wall,
                "per_s": count / wall,
                "cpu_s": cpu,
                "listing_cpu_s": listing,
                "peak_mb": int(peak.split()[1]) / 1024,
            }
        )
    )


@click.command()
@click.option("--one", "bucket", hidden=True)
@click.option("--objects", "sizes", type=int, multiple=True, default=(100_000, 2_000_000), show_default=True)
@click.option("--threads", default=4, show_default=True, help="As of maskwatch backfill.")
@click.option("--json", "as_json", is_flag=True)
def main(bucket: str | None, sizes: tuple[int, ...], threads: int, as_json: bool) -> None:
    """Discover, plan and register synthetic archives of these sizes, one after the other."""
    if bucket is not None:
        one(bucket, sizes[0], threads)
        return
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    try:
        results = measure(sizes, threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(
            f"{result['objects']:>9,} objects  {result['per_s']:>7,.0f} per second  {result['peak_mb']:.0f} MB at most"
            f"  ({result['listing_cpu_s']:.1f} s CPU of the lister alone, {result['cpu_s']:.1f} s of the process)"
        )
    growth = results[-1]["peak_mb"] / results[0]["peak_mb"]
    print(f"memory {growth:.2f} times from the smallest to the largest (the claim: at most 1.10; 10,000 per second)")


def measure(sizes: tuple[int, ...], threads: int) -> list[dict[str, float]]:
    from common.cli.parts.deployment import deployment

    with deployment():
        # Each in a process of its own, because it is the most memory of a process that is asked for.
        return [
            json.loads(
                subprocess.run(
                    [
                        *(sys.executable, "-m", "benchmarks.discover", "--one", f"s3://archive-{number}"),
                        *("--objects", str(size), "--threads", str(threads)),
                    ],
                    stdout=subprocess.PIPE,
                    check=True,
                ).stdout
            )
            for number, size in enumerate(sizes)
        ]


if __name__ == "__main__":
    main()
