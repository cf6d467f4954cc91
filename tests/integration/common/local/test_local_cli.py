"""The `maskwatch local` commands, run as people run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from common.local.stack import LocalStack


def maskwatch(stack: LocalStack, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "common.cli", "local", *arguments],
        env={**os.environ, "MASKWATCH_STATE_DIR": str(stack.state_dir), "COLUMNS": "200"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_up_status_psql_down(stack: LocalStack) -> None:
    assert maskwatch(stack, "status").returncode == 3
    assert not stack.state_dir.exists(), "looking makes nothing"

    done = maskwatch(stack, "up", "--json")
    assert done.returncode == 0, done.stderr
    assert [service["running"] for service in json.loads(done.stdout)["services"]] == [True] * 3
    password = json.loads((stack.state_dir / "state.json").read_text())["password"]
    assert password not in done.stdout

    done = maskwatch(stack, "up", "--show-env")
    assert f":{password}@" in done.stdout
    shell = subprocess.run(["sh", "-c", f"{done.stdout}\nenv"], capture_output=True, text=True, check=True)
    endpoints = stack.endpoints()
    assert endpoints is not None
    assert {f"{name}={value}" for name, value in endpoints.environment().items()} <= set(shell.stdout.splitlines())

    done = maskwatch(stack, "status", "--json")
    assert done.returncode == 0
    assert [service["name"] for service in json.loads(done.stdout)] == ["postgres", "redis", "s3"]

    assert maskwatch(stack, "psql", "-At", "-c", "SELECT 6 * 7").stdout == "42\n"
    assert maskwatch(stack, "psql", "-v", "ON_ERROR_STOP=1", "-c", "SELECT nonsense").returncode == 1

    assert maskwatch(stack, "down").returncode == 0
    assert maskwatch(stack, "status").returncode == 3
    assert maskwatch(stack, "psql", "-At", "-c", "SELECT 6 * 7").stdout == "42\n", "psql starts what it needs"
    assert maskwatch(stack, "status").returncode == 3, "and stops it again"
    assert maskwatch(stack, "down", "--purge").returncode == 0
    assert not stack.state_dir.exists()


def test_help_teaches_by_example() -> None:
    for command in ("up", "down", "status", "psql"):
        done = subprocess.run(
            [sys.executable, "-m", "common.cli", "local", command, "--help"], capture_output=True, text=True, check=True
        )
        assert f"  maskwatch local {command}" in done.stdout


def test_an_error_is_one_line(stack: LocalStack, tmp_path: Path) -> None:
    stack.state_dir.write_text("a file")
    done = maskwatch(stack, "up")
    stack.state_dir.unlink()
    assert done.returncode == 1
    assert done.stderr.startswith("error: the state directory ")
    assert done.stderr.count("\n") == 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(stack.state_dir) in (p.info["cmdline"] or [])]
