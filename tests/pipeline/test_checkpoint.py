"""Checkpoints that are damaged or half written: each is refused by name. Hostile ones: test_hostile_checkpoint*.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from features.errors import UserError
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest, writer

pytestmark = pytest.mark.usefixtures("group")
FILES = ["tensors.json", "rank-00000.bin", "manifest.json"]


def state(fill: int | None = None) -> dict[str, Any]:
    """Two levels of names, a scalar, two types of numbers, an empty branch; zeros to be filled where `fill` is None."""
    generator = torch.Generator().manual_seed(fill or 0)
    weight, step = torch.randn(7, 5, generator=generator), torch.tensor(float(fill or 0))
    big = torch.arange(40_000) * (fill or 0)
    if fill is None:
        weight.zero_()
    return {"model": {"a.weight": weight, "ids": big}, "dense": {"a.weight": {"step": step}}, "tables": {}}


def manifest(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        rows=step * 8,
        epoch=1,
        cursors=[3, 4],
        seed=5,
        window=16,
        batch_size=8,
        data="d",
        fingerprint="f",
        encoders="e",
        config="c",
    )


def save(folder: Path, step: int = 3, fill: int = 1) -> Path:
    return checkpoint.save(folder, state(fill), manifest(step))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    pairs = [(a["model"][k], b["model"][k]) for k in a["model"]]
    pairs.append((a["dense"]["a.weight"]["step"], b["dense"]["a.weight"]["step"]))
    return all(torch.equal(x, y) for x, y in pairs)


def test_what_is_saved_is_loaded_with_or_without_a_group(tmp_path: Path) -> None:
    path = save(tmp_path)
    assert path.name == "step-00000003"
    found = checkpoint.check(path)
    assert {p.name for p in path.iterdir()} == set(FILES)
    assert set(found.files) == set(FILES) - {"manifest.json"}
    assert found.model_copy(update={"files": {}, "checksum": ""}) == manifest(3)
    for alone in (False, True):
        empty = state()
        checkpoint.load(path, empty, alone=alone)
        assert same(empty, state(1))


def test_the_files_of_all_ranks_are_gathered_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_gather_object", None)
    checkpoint.check(save(tmp_path))


def test_a_part_can_be_loaded_by_itself(tmp_path: Path) -> None:
    part = {"model": {"a.weight": torch.zeros(7, 5)}}
    checkpoint.load(save(tmp_path), part, alone=True)
    assert torch.equal(part["model"]["a.weight"], state(1)["model"]["a.weight"])


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"model": {"a.weight": torch.zeros(6, 5)}}, "Size mismatch"),
        ({"model": {"b.weight": torch.zeros(1)}}, "model.b.weight"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, wanted: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load(save(tmp_path), wanted, alone=True)
    assert "\n" not in str(error.value)


# Damage


@pytest.mark.integration
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_where(tmp_path: Path, name: str) -> None:
    file = save(tmp_path) / name
    good = file.read_bytes()
    told: set[str] = set()
    places = range(len(good)) if len(good) < 2000 else range(0, len(good), len(good) // 200)
    for place in places:
        for bit in (0, 7):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            file.write_bytes(bad)
            try:
                found = checkpoint.check(file.parent)
            except UserError as error:
                told.add(str(error).replace(str(file), "FILE").replace(str(file.parent), "FOLDER"))
            else:  # white space in the manifest, or the name of a value that is the default
                assert name == "manifest.json"
                assert found == CheckpointManifest.model_validate_json(good)
    assert told
    assert all(
        line.startswith(("FILE", "FOLDER: not a checkpoint, manifest.json", "FOLDER: checkpoint of")) for line in told
    )
    assert name == "manifest.json" or told == {
        "FILE: its checksum is not the manifest's: it changed after it was written"
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["cut", "empty", "longer", "gone"])
def test_a_file_that_is_cut_or_gone_is_named(tmp_path: Path, name: str, change: str) -> None:
    file = save(tmp_path) / name
    content = file.read_bytes()
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"x"}[change])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        checkpoint.check(file.parent)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": 3', '"version": 4'))
    with pytest.raises(UserError, match="checkpoint of version 4, this release reads 3"):
        checkpoint.check(path)


# Crashes


def test_only_whole_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path / "none") == []
    for step in (100, 9, 20):
        save(tmp_path, step)
    for name in (".step-00000200", "step-00000300.old", "step-", "step-x", "best"):
        shutil.copytree(tmp_path / "step-00000009", tmp_path / name)
    (tmp_path / "step-00000400").mkdir()
    (tmp_path / "step-00000500").write_text("")
    assert checkpoint.steps(tmp_path) == [9, 20, 100]


def die(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_said_in_one_line_and_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._Writer, "write_data", full)
    with pytest.raises(UserError, match=r"step-00000002: cannot be written: .*No space left on device"):
        save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001"}


@pytest.mark.parametrize("where", ["in dcp.save", "before the manifest", "before the rename"])
def test_a_crash_at_any_point_leaves_the_checkpoints_before_it_and_the_next_save_works(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        if where == "in dcp.save":
            patch.setattr(writer._Writer, "finish", die)
        elif where == "before the manifest":
            patch.setattr(writer, "write_json", die)
        else:
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: die() if self.name == ".step-00000002" else rename(self, to))
        with pytest.raises(BaseException):  # noqa: B017
            save(tmp_path, 2)
    assert (tmp_path / ".step-00000002").exists()
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.check(tmp_path / "step-00000001")
    (tmp_path / ".step-00000002" / "rank-00009.bin").write_text("of a rank that is no more")
    path = save(tmp_path, 2, fill=4)
    assert {p.name for p in path.iterdir()} == set(FILES)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}
    empty = state()
    checkpoint.load(path, empty, alone=True)
    assert same(empty, state(4))


@pytest.mark.parametrize("fault", ["one too many", "one too few"])
def test_files_that_the_manifest_would_not_have_are_an_error_and_no_checkpoint(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    finish = writer._Writer.finish

    def finished(self: writer._Writer, *given: Any, **named: Any) -> None:
        finish(self, *given, **named)
        if fault == "one too many":
            (self.path / "rank-00001.bin").write_text("of a rank that is not in this run")
        else:
            (self.path / "rank-00000.bin").unlink()

    monkeypatch.setattr(writer._Writer, "finish", finished)
    says = (
        r"rank-00001\.bin is not in all of manifest"
        if fault == "one too many"
        else r"rank-00000\.bin is missing, or has another size than the manifest"
    )
    with pytest.raises(UserError, match=rf"step-00000002: cannot be written: .*{says}"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_whose_manifest_lists_no_files_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "manifest.json").write_text(manifest(3).sealed({}).model_dump_json())
    with pytest.raises(UserError, match=r"its manifest names no tensors\.json"):
        checkpoint.check(path)


def test_a_checkpoint_saved_again_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    path = save(tmp_path, 3, fill=1)
    (path / "__0_0.distcp").write_bytes(b"")
    save(tmp_path, 3, fill=2)
    checkpoint.check(path)
    empty = state()
    checkpoint.load(path, empty, alone=True)
    assert same(empty, state(2))
