"""report.html: self-contained, and safe whatever keys, names and reasons say."""

from __future__ import annotations

import errno
import os
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image
from sqlalchemy.orm import Session

from common.domain import JobState, MaskwatchError
from common.reporting import report
from common.reporting.report import MAX_IMAGES, write_report
from tests.archive import Archive

HOSTILE = "<script>alert('x')</script>"
START = datetime(2026, 3, 28, 7, 10, tzinfo=UTC)


class Page(HTMLParser):
    """The elements of a page, and the values of attributes that could load something."""

    LOADING = ("src", "href", "xlink:href", "action", "data", "srcset", "poster")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in self.LOADING]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def fill(archive: Archive, location: str = "lobby", days: int = 2) -> None:
    pipeline = archive.pipeline()
    place = archive.location(location, "Europe/Berlin", pipeline)
    archive.camera(place, HOSTILE)
    for day in range(days):
        archive.image(place, START + timedelta(days=day), (3, 1, 1), pipeline=pipeline)
    bad = archive.media(place, f"{HOSTILE}.jpg")
    archive.job(bad, pipeline, JobState.QUARANTINED, reason="empty_file", detail=f"{HOSTILE} & more")
    archive.summarize()


def images(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"picture-{number}.png" for number in range(count)]
    for path in paths:
        Image.new("RGB", (1600, 900), (90, 120, 90)).save(path)
    return paths


def test_loads_nothing_from_outside(archive: Archive, tmp_path: Path) -> None:
    fill(archive)
    write_report(archive.session, tmp_path / "report.html", images=images(tmp_path, 2))
    text, page = read(tmp_path / "report.html")
    assert [value[:24] for value in page.loaded if value.startswith("data:")] == ["data:image/jpeg;base64,/"] * 2
    assert all(value.startswith(("data:image/", "#")) for value in page.loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))


def test_hostile_names_stay_text(archive: Archive, tmp_path: Path) -> None:
    fill(archive, location=f"hall {HOSTILE}")
    write_report(archive.session, tmp_path / "report.html")
    text, page = read(tmp_path / "report.html")
    assert HOSTILE not in text
    words = "".join(page.words)
    for shown in (f"hall {HOSTILE}", f"s3://footage/{HOSTILE}.jpg", f"{HOSTILE} & more"):
        assert shown in words


def test_shows_figures_days_plot_and_reasons(archive: Archive, tmp_path: Path) -> None:
    fill(archive)
    write_report(archive.session, tmp_path / "deep" / "report.html")
    text, page = read(tmp_path / "deep" / "report.html")
    words = " ".join("".join(page.words).split())
    assert page.tags.count("svg") == 1
    for shown in (
        "75.0 %",
        "2026-03-28 Sat",
        "2026-03-29 Sun",
        "empty_file",
        "1 quarantined",
        "the pattern of their key",
    ):
        assert shown in words
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    assert "currentColor" in text


def test_long_times_are_drawn_by_day(archive: Archive, tmp_path: Path) -> None:
    fill(archive, days=80)
    write_report(archive.session, tmp_path / "report.html")
    words = "".join(read(tmp_path / "report.html")[1].words)
    assert "rate by day" in words
    assert "18 earlier days" in words


def test_empty_database_says_how_to_begin(session: Session, tmp_path: Path) -> None:
    write_report(session, tmp_path / "report.html")
    assert "maskwatch demo" in read(tmp_path / "report.html")[0]


def test_location_without_figures_comes_last(archive: Archive, tmp_path: Path) -> None:
    archive.location("attic", "Europe/Berlin", None)
    fill(archive)
    write_report(archive.session, tmp_path / "report.html")
    text = read(tmp_path / "report.html")[0]
    assert text.index("<h2>lobby</h2>") < text.index("<h2>attic</h2>") < text.index("Nothing analysed yet")


def test_images_are_few_and_small(archive: Archive, tmp_path: Path) -> None:
    fill(archive)
    write_report(archive.session, tmp_path / "report.html", images=images(tmp_path, MAX_IMAGES + 3))
    text, page = read(tmp_path / "report.html")
    assert page.tags.count("img") == MAX_IMAGES
    assert len(text) < 500_000


def test_unreadable_image_and_unwritable_path_are_named(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(MaskwatchError, match=r"notes\.jpg"):
        write_report(archive.session, tmp_path / "report.html", images=[tmp_path / "notes.jpg"])
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(MaskwatchError, match="can't write the report"):
        write_report(archive.session, tmp_path / "notes.jpg" / "report.html")


def test_a_report_that_fails_leaves_the_earlier_one_and_no_other_file(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(archive)
    path = tmp_path / "report.html"
    write_report(archive.session, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(MaskwatchError, match="No space left on device"):
        disk.setattr(Path, "replace", full)  # the last step
        write_report(archive.session, path)
    with monkeypatch.context() as page, pytest.raises(UndefinedError):
        page.setattr(report, "_sections", lambda session: [None])
        write_report(archive.session, path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(MaskwatchError, match="can't write the report"):
        write_report(archive.session, tmp_path / "folder")
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.html", "folder"}


def test_a_image_whose_name_is_no_text_is_shown(archive: Archive, tmp_path: Path) -> None:
    fill(archive)
    odd = images(tmp_path, 1)[0].rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    write_report(archive.session, tmp_path / "report.html", images=[odd])
    text, page = read(tmp_path / "report.html")
    assert page.tags.count("img") == 1 and "caf?.png" in text
