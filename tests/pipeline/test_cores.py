"""Cores that a process may use, in a container and outside of one."""

import os
from pathlib import Path

import pytest

from pipeline import cores


@pytest.mark.parametrize(
    ("content", "available"),
    [
        ("200000 100000", 2),
        ("150000 100000\n", 2),
        ("50000 100000", 1),
        ("max 100000", 64),
        ("9900000 100000", 64),
        ("", 64),
    ],
)
def test_a_limit_of_the_container_bounds_the_cores_of_the_machine(
    content: str, available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores.available() == available


def test_without_a_container_it_is_the_cores_it_is_bound_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "missing")
    assert cores.available() == len(os.sched_getaffinity(0))
