"""`maskwatch backfill`: enqueue the footage of a bucket prefix or a folder."""

from __future__ import annotations

from datetime import datetime

import click

from common.cli.parts.console import bar, json_option, note, print_json, print_table
from common.cli.parts.deployment import deployment
from common.cli.parts.options import parse_bounds, source_options
from common.cli.parts.waiting import wait_for
from producer.cli.listing import conclude, listing_options, nudge, restore_of
from producer.estimate import Estimate, estimate
from producer.submit import fill_gaps, submit


@click.command()
@source_options(source_required=False)
@listing_options
@click.option(
    "--inventory",
    metavar="MANIFEST",
    help="Read this S3 Inventory instead of listing: the manifest.json of a delivery, in CSV or Parquet, with Size, "
    "LastModifiedDate and ETag (and StorageClass, if objects are archived). For tens of millions of objects.",
)
@click.option("--wait", is_flag=True, help="Wait until everything in the backfill is analysed and summarized.")
@click.option(
    "--gaps", is_flag=True, help="Without SOURCE: enqueue only what a camera's hours lack (see maskwatch coverage)."
)
@click.option("--dry-run", is_flag=True, help="Only print what it would find, enqueue and cost; write nothing.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True,
    help="Worker processes, to estimate the time of a dry run.",
)  # fmt: skip
@click.option(
    "--price-per-hour", type=click.FloatRange(0), metavar="PRICE",
    help="Price of an hour of a worker process, to estimate the cost of a dry run.",
)  # fmt: skip
@json_option
def backfill(
    source: str | None,
    location: str,
    camera: str | None,
    time_pattern: str | None,
    since: str | None,
    until: str | None,
    restore_tier: str | None,
    restore_days: int,
    threads: int,
    inventory: str | None,
    wait: bool,
    gaps: bool,
    dry_run: bool,
    workers: int,
    price_per_hour: float | None,
    as_json: bool,
) -> None:
    """Enqueue every picture and video below SOURCE: s3://bucket/prefix, or a folder.

    Running it again adds nothing: known objects are skipped, replaced ones are analysed again. If the listing was
    stopped, the same command goes on where it was. Objects of other kinds are counted and named.

    \b
    Examples:
      maskwatch backfill s3://footage/2026/ --location lobby --wait
      maskwatch backfill s3://footage/door/ --location lobby --camera door \\
          --time-pattern 'door/%Y/%m/%d/%H-%M-%S.jpg' --since 2026-03-01
      maskwatch backfill s3://footage/gate/ --location gate --sample-fps 2
      maskwatch backfill s3://footage/ --location lobby --dry-run --workers 16 --price-per-hour 0.05
      maskwatch backfill s3://footage/2026/ --location lobby \\
          --inventory s3://inventories/footage/daily/2026-11-01T01-00Z/manifest.json
    """
    bounds = parse_bounds(since, until)
    if gaps:
        if source is not None or camera is None or dry_run or inventory is not None:
            raise click.UsageError(
                "--gaps needs --location and --camera, and excludes SOURCE, --inventory and --dry-run"
            )
        _fill_gaps(location, camera, bounds, wait=wait, as_json=as_json)
        return
    if source is None:
        raise click.UsageError("name a SOURCE: s3://bucket/prefix, or a folder")
    with deployment() as settings:
        if dry_run:
            with bar("listing") as shown:
                result = estimate(
                    settings,
                    source,
                    location_name=location,
                    time_pattern=time_pattern,
                    bounds=bounds,
                    inventory_uri=inventory,
                    restore_tier=restore_tier.capitalize() if restore_tier else None,
                    workers=workers,
                    price_per_hour=price_per_hour,
                    on_page=shown.show,
                )
            if as_json:
                print_json(result.as_dict())
            else:
                _print_estimate(result)
            return
        with bar("listing") as shown:
            report = submit(
                settings,
                source,
                location_name=location,
                camera_name=camera,
                time_pattern=time_pattern,
                bounds=bounds,
                inventory_uri=inventory,
                restore=restore_of(restore_tier, restore_days),
                threads=threads,
                on_page=lambda so_far: shown.show(so_far.listed),
            )
        conclude(settings, report, wait=wait, as_json=as_json)


def _fill_gaps(
    location: str, camera: str, bounds: tuple[datetime | None, datetime | None], *, wait: bool, as_json: bool
) -> None:
    with deployment() as settings:
        with bar("listing") as shown:
            hours, new, again = fill_gaps(
                settings,
                location_name=location,
                camera_name=camera,
                bounds=bounds,
                on_page=shown.show,
            )
        nudge()
        if wait:
            wait_for(settings, location)
    if as_json:
        print_json({"hours": hours, "new": new, "again": again})
    else:
        note(f"{hours} hours lacked footage: {new} objects are new, {again} failed jobs are tried again")


def _print_estimate(result: Estimate) -> None:
    found, rates = result.found, result.cost_model

    def known(value: float | None, form: str) -> str:
        return "unknown until some footage is analysed" if value is None else form.format(value)

    rows = [
        ("pictures", f"{found.images:,} ({found.image_bytes / 2**30:,.2f} GiB)"),
        ("videos", f"{found.videos:,} ({found.video_bytes / 2**30:,.2f} GiB)"),
        ("footage of videos", known(result.footage_hours, "{:,.2f} hours")),
        ("jobs", known(result.jobs, "{:,}")),
        ("face rows", known(result.face_rows, "about {:,}")),
        ("worker-hours", known(result.worker_hours, "{:,.2f}")),
        (f"time with {result.workers} worker process(es)", known(result.hours, "{:,.2f} hours")),
    ]
    if result.cost is not None:
        rows.append(("cost", f"{result.cost:,.2f}"))
    if found.archived:
        rows += [
            (f"in {name}", f"{count:,} ({found.archived_bytes[name] / 2**30:,.2f} GiB)")
            for name, count in sorted(found.archived.items())
        ]
        rows.append(("restoring these, at list prices", known(result.restore_cost, "{:,.2f} US dollars")))
    print_table(f"Dry run: {result.source} for {result.location}", ["", ""], rows)
    if result.inventory:
        note(f"  read from the inventory {result.inventory}")
    left = [
        (found.known, "known already"),
        (found.unplaced, "whose key gives no time by this pattern, and would be quarantined"),
        (found.outside_range, "outside --since/--until"),
        (found.others, "neither pictures nor videos"),
    ]
    for count, what in left:
        if count:
            note(f"  {count:,} {what}")
    note(
        f"  a picture takes {rates.seconds_per_image.value:.3f} s ({rates.seconds_per_image.origin}), a second of "
        f"video {rates.seconds_per_footage_second.value:.3f} s ({rates.seconds_per_footage_second.origin})"
    )
