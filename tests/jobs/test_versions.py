"""Releases of torch, TorchRec and FBGEMM that do not belong together end a job in one line, before any is imported."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from features.errors import UserError
from jobs.versions import check_versions

ROOT = Path(__file__).parents[2]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr("jobs.versions.metadata.version", version)


def test_the_installed_releases_belong_together() -> None:
    check_versions()


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm_gpu_cpu": "1.8.0"},
        {"torch": "2.13.1", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0+cu130"},
        {"torch": "2.12.0", "torchrec": "1.7.0", "fbgemm_gpu": "1.7.0"},
        {"torch": "2.11.0a0+git1234567", "torchrec": "1.6.1", "fbgemm_gpu": "1.6.0"},
        {"torch": "2.15.0.dev20261101", "torchrec": "2026.11.1", "fbgemm_gpu": "2026.11.1"},
        {"torch": "3.0.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0"},
        {"torch": "2.11.0"},
        {},
    ],
    ids=lambda versions: " ".join(versions.values()) or "none",
)
def test_a_set_of_one_release_and_what_is_unknown_are_let_through(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    installed(monkeypatch, **versions)
    check_versions()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        (
            {"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm_gpu": "1.8.0"},
            "fbgemm-gpu 1.8.0 is built for torch 2.13, and torch 2.11.0 is installed.*torchrec and fbgemm-gpu 1.6$",
        ),
        ({"torch": "2.13.0", "torchrec": "1.9.2", "fbgemm_gpu": "1.8.0"}, "torchrec 1.9.2 is built for torch 2.14"),
        ({"torch": "2.15.0+cu130", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0"}, "torch 2.15.0.cu130 is installed"),
        (
            {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm_gpu_cpu": "1.6.0"},
            "fbgemm-gpu-cpu 1.6.0 is built for torch 2.11",
        ),
    ],
)
def test_releases_that_do_not_belong_together_are_named_with_what_fits(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], message: str
) -> None:
    installed(monkeypatch, **versions)
    with pytest.raises(UserError, match=message):
        check_versions()


def test_a_job_says_so_in_one_line_and_never_imports_them(tmp_path: Path) -> None:
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n"
    )
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    command = [sys.executable, "-m", "jobs.train", "dataset=nowhere", f"run={tmp_path / 'run'}"]
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: torchrec 1.")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
