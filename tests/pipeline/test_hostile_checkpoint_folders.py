"""The files of a checkpoint from somebody else: links, pipes, names and counts that lead out of its folder or mean nothing."""

import builtins
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import saved, state

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import lock

pytestmark = pytest.mark.usefixtures("group")


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json", "rank-00000.bin"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_a_file_that_is_no_regular_one_is_refused_unread(tmp_path: Path, name: str, kind: str) -> None:
    path = saved(tmp_path / "run")
    shutil.move(path / name, tmp_path / name)
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to(tmp_path / name if kind == "link" else "/dev/zero")
    for use in (checkpoint.check, lambda path: checkpoint.load(path, state(), alone=True)):
        with pytest.raises(UserError, match=rf"{name} is (a link|not a regular file)"):
            use(path)
    if name == "manifest.json":
        with pytest.raises((UserError, OSError), match=r"symbolic link|not a regular file"), checkpoint.reading(path):
            pass


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "a/b", ".hidden", "a\n"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    content = json.loads((path / "manifest.json").read_text())
    content["files"][name] = [1, "0"]
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        checkpoint.check(path)


@pytest.mark.parametrize("key", ["step", "rows", "epoch", "left_out", "window", "batch_size", "ranks"])
@pytest.mark.parametrize("value", [-1, 1 << 63, 1.5, "1", None, True])
def test_a_manifest_has_no_counts_below_zero_or_of_another_type(tmp_path: Path, key: str, value: object) -> None:
    path = saved(tmp_path)
    content = json.loads((path / "manifest.json").read_text()) | {key: value}
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        checkpoint.check(path)


def test_writing_deleting_and_tidying_leave_what_links_point_to(tmp_path: Path) -> None:
    run, outside = tmp_path / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("of somebody else")
    run.mkdir()
    (run / ".step-00000003").symlink_to(outside)
    (run / ".step-00000003.deleted").symlink_to(outside)
    (run / "step-00000002").symlink_to(outside)
    path = saved(run)
    checkpoint.check(path)
    assert checkpoint.remove(run / "step-00000002")
    assert checkpoint.remove(path)
    lock.tidy(run)
    assert [file.name for file in outside.iterdir()] == ["kept"]
    assert list(run.iterdir()) == []


def test_a_checkpoint_that_takes_the_place_of_a_link_is_not_written_through_it(tmp_path: Path) -> None:
    run, outside = tmp_path / "checkpoints", tmp_path / "outside"
    shutil.copytree(saved(tmp_path / "other"), outside)
    before = {file.name: file.read_bytes() for file in outside.iterdir()}
    run.mkdir()
    (run / "step-00000003").symlink_to(outside)
    assert not saved(run).is_symlink()
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == before


def test_files_of_a_checkpoint_are_opened_only_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = saved(tmp_path), []
    plain = builtins.open

    def noted(file: Any, *given: Any, **named: Any) -> Any:
        opened.append(file)
        return plain(file, *given, **named)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr("io.open", noted)
    checkpoint.load(path, state(), alone=True)
    assert [file for file in opened if not isinstance(file, int)] == [path / "rank-00000.bin"]
