"""jobs.compare from a raw log to its tables, and again over what is there."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def conf(small_log: Path, small_content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data group and a recipe of the user's own."""
    folder = tmp_path_factory.mktemp("conf")
    content = {"input": str(small_log), "schema": small_content()}
    train = {"batch_size": 64, "lanes": 4, "epochs": 3, "log_every": 3}
    for name, text in (
        ("data", yaml.safe_dump(content)),
        ("recipe", "# @package _global_\n" + yaml.safe_dump({"train": train})),
    ):
        (folder / name).mkdir()
        (folder / name / "mine.yaml").write_text(text)
    return folder


def compare(conf: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.compare", f"--config-dir={conf}", "data=mine", f"folder={folder}"]
    more = ["recipe_name=mine", "models=[shared_bottom,mmoe]", "seeds=2", *arguments]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=280, check=False)


def test_models_are_compared_once_and_the_tables_name_all_of_them(conf: Path, tmp_path: Path) -> None:
    done = compare(conf, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for name in ("shared_bottom", "mmoe", "boosted trees", "AUC click", "NE % bought", "FLOPs/row", "dwell 3/7"):
        assert name in done.stdout, name
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert "| mmoe" in " ".join((tmp_path / "out" / "compare.md").read_text().replace("|", " | ").split())
    frame = pl.read_parquet(tmp_path / "out" / "compare.parquet")
    assert set(frame["at"]) == {"chosen", "1/7", "3/7", "7/7"}
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    chosen = frame.filter((pl.col("model") == "mmoe") & (pl.col("task") == "click") & (pl.col("at") == "chosen"))
    assert chosen["ne"].to_list() == [run["metrics"]["click"]["ne"] for run in results["mmoe"]]

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/checkpoints/*/manifest.json")}
    assert len(kept) == 4 * 5  # an epoch's, and those after 1/7 and 3/7
    again = compare(conf, tmp_path / "out")
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = compare(conf, tmp_path / "out", 'overrides=["train.dense.lr=0.1"]')
    assert other.returncode == 1
    assert "made with another recipe or overrides" in other.stderr


def test_a_baseline_that_is_not_compared_is_refused(conf: Path, tmp_path: Path) -> None:
    done = compare(conf, tmp_path / "out", "baseline=ple")
    assert done.returncode == 1
    assert done.stderr == "error: baseline=ple is not one of models: shared_bottom, mmoe\n"
