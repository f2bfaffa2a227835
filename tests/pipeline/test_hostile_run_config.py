"""A run's config.yaml that was handed over: what is no configuration of a run is one line, and nothing else is read of it."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.run.run import Run

CONTENT: dict[str, Any] = {
    "dataset": "/data/x", "days": None, "run": "/runs/x", "tasks": ["click"], "model": {"fusion": {"name": "mmoe"}},
    "train": {"epochs": 1}, "resume": "auto",
}  # fmt: skip


def run_with(folder: Path, text: str | bytes) -> Run:
    (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Run(folder)


def changed(key: str, value: Any) -> str:
    return yaml.safe_dump(copy.deepcopy(CONTENT) | {key: value})


def test_what_jobs_train_writes_is_read(tmp_path: Path) -> None:
    run = run_with(tmp_path, yaml.safe_dump(CONTENT))
    assert run.config() == CONTENT
    assert ModelConfig.of_run(run.config(), tmp_path).fusion == {"name": "mmoe"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("text", "holds no keys"),
        ("a: [", "not YAML"),
        (b"dataset: \xff", "is not UTF-8"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested more than"),
        ("a: &a [x]\nb: *a\n", "anchors and aliases"),
        ("model: {}", "dataset: Field required"),
        (changed("dataset", ["/a", "/b"]), "dataset: "),
        (changed("dataset", "/a\0b"), "dataset: "),
        (changed("tasks", 5), "tasks: "),
        (changed("tasks", [{"a": 1}]), "tasks.0: "),
        (changed("days", 5), "days: "),
        (changed("model", None), "model: "),
        (changed("train", "all"), "train: "),
    ],
)
def test_another_content_is_one_line(text: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        run_with(tmp_path, text).config()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", [{}, {"fusion": 5}, {"fusion": {}, "tower": "abc"}, {"fusion": {}, "_target_": "os.system"}]
)
def test_a_model_that_is_none_is_one_line(model: dict[str, Any], tmp_path: Path) -> None:
    run = run_with(tmp_path, changed("model", model))
    with pytest.raises(UserError, match=r"config\.yaml: model\."):
        ModelConfig.of_run(run.config(), tmp_path)


def test_neither_links_nor_pipes_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a link"):
        Run(tmp_path).config()
    (tmp_path / "config.yaml").unlink()
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="is not a regular file but a pipe"):
        Run(tmp_path).config()
