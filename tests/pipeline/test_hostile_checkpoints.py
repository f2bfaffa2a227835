"""A checkpoint from somebody else: it runs nothing, reads nothing outside of itself, and takes no more than its own size."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_pickle import Payload
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import memory_below
from mutations import mutated
from small_checkpoint import MANIFEST, saved, state
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from features.errors import UserError
from features.printable import has_controls
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointManifest, reader
from pipeline.run.checkpoint.index import Index, read_index
from pipeline.run.run import config_hash
from pipeline.storage.files import sha256

pytestmark = pytest.mark.usefixtures("group")
NUMPY = {"float32": np.float32, "float64": np.float64, "int64": np.int64, "uint8": np.uint8, "bool": np.bool_}


def reseal(path: Path) -> None:
    """What somebody who may write to the folder can do: make the manifest fit the files."""
    content = CheckpointManifest.model_validate_json((path / "manifest.json").read_text())
    sealed = content.sealed({name: ((path / name).stat().st_size, sha256(path / name)) for name in content.files})
    (path / "manifest.json").write_text(sealed.model_dump_json())


def change_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / "tensors.json").read_text())
    change(index["tensors"])
    (path / "tensors.json").write_text(json.dumps(index))
    reseal(path)


# Pickles


@pytest.mark.parametrize(
    "use", [checkpoint.check, checkpoint.shapes, lambda path: checkpoint.load(path, state(), alone=True)]
)
def test_a_checkpoint_with_a_pickled_index_is_refused_unopened(tmp_path: Path, use: Callable[[Path], Any]) -> None:
    """As releases before this one wrote them, with all checksums right."""
    path, marker = tmp_path / "step-00000003", tmp_path / "ran"
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(path))
    (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    files = {file.name: (file.stat().st_size, sha256(file)) for file in path.iterdir()}
    (path / "manifest.json").write_text(
        json.dumps(json.loads(MANIFEST.model_dump_json()) | {"version": 2, "files": files})
    )
    with pytest.raises(
        UserError, match="checkpoint of version 2, this release reads 3: the index of older ones is a pickle"
    ):
        use(path)
    assert not marker.exists()


def test_a_pickled_index_beside_the_other_is_not_opened(tmp_path: Path) -> None:
    path, marker = saved(tmp_path), tmp_path / "ran"
    (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    loaded = state()
    checkpoint.load(path, loaded, alone=True)
    assert torch.equal(loaded["model"]["ids"], torch.arange(40))
    assert not marker.exists()


def test_data_in_the_form_of_a_pickle_are_numbers_like_others(tmp_path: Path) -> None:
    path, marker = saved(tmp_path), tmp_path / "ran"
    size = (path / "rank-00000.bin").stat().st_size
    for planted in (pickle.dumps(Payload(marker)), _torch_file(Payload(marker), tmp_path)):
        (path / "rank-00000.bin").write_bytes(planted.ljust(size, b"\0"))
        reseal(path)
        checkpoint.check(path)
        checkpoint.load(path, state(), alone=True)
    assert not marker.exists()


def _torch_file(content: object, folder: Path) -> bytes:
    torch.save(content, folder / "file")
    return (folder / "file").read_bytes()


def test_nothing_is_unpickled_while_a_checkpoint_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, loaded = saved(tmp_path), state()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle is opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    checkpoint.check(path)
    checkpoint.load(path, loaded, alone=True)
    assert loaded["step"] == 3.0


def test_what_would_be_unpickled_is_refused_by_reader_and_planner(tmp_path: Path) -> None:
    path = saved(tmp_path)
    index = MetadataIndex("step")
    item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size([0]), index, torch.Size([0]), torch.Size([1]))
    source = reader._Reader(path, read_index(path, checkpoint.read(path)))
    for refuse in (
        lambda: source.read_data(LoadPlan([item]), reader._TensorsOnly()),
        lambda: reader._TensorsOnly().load_bytes(item, None),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match="step is no tensor"):
            refuse()


@pytest.mark.parametrize("value", [7, "text", None, [1, 2], b"bytes"])
def test_a_state_with_anything_but_tensors_is_not_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises((UserError, TypeError), match=r"model\.a.* is no tensor: a checkpoint holds nothing else"):
        checkpoint.save(tmp_path, {"model": {"a": value}}, MANIFEST)
    assert list(tmp_path.iterdir()) == []


# Indices


def entry(index: dict[str, Any]) -> dict[str, Any]:
    return index["model.a.weight"]


INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a type that runs code": (lambda i: entry(i).update(dtype="object"), "dtype"),
    "a type of another size": (lambda i: entry(i).update(dtype="float64"), "does not fit into"),
    "a shape of another rank": (lambda i: entry(i).update(shape=[35]), "another number of dimensions"),
    "a shape larger than its parts": (lambda i: entry(i).update(shape=[8, 5]), "do not add up"),
    "a shape of 6.6 GB": (lambda i: entry(i).update(shape=[330_000_000, 5]), "do not add up"),
    "no parts": (lambda i: entry(i).update(parts=[]), "do not add up"),
    "a bomb": (
        lambda i: entry(i).update(shape=[1 << 40, 5], parts=[entry(i)["parts"][0] | {"sizes": [1 << 40, 5]}]),
        "does not fit into the 516 bytes of rank-00000.bin",
    ),
    "more elements than 2^63": (
        lambda i: entry(i).update(
            shape=[1 << 40] * 3, parts=[entry(i)["parts"][0] | {"offsets": [0] * 3, "sizes": [1 << 40] * 3}]
        ),
        "more elements",
    ),
    "a negative size": (lambda i: entry(i).update(shape=[-7, -5]), "greater than or equal to 0"),
    "a negative start": (lambda i: entry(i)["parts"][0].update(start=-64), "greater than or equal to 0"),
    "a start behind the end": (lambda i: entry(i)["parts"][0].update(start=1 << 40), "does not fit into"),
    "a start between numbers": (lambda i: entry(i)["parts"][0].update(start=1), "does not fit into"),
    "offsets beyond the shape": (lambda i: entry(i)["parts"][0].update(offsets=[1, 0]), "reaches beyond"),
    "a part twice and a gap": (
        lambda i: entry(i).update(shape=[14, 5], parts=entry(i)["parts"] * 2), "two of its parts overlap"),
    "a transform": (lambda i: entry(i)["parts"][0].update(transform_descriptors=["zstd"]), "Extra inputs"),
    "a number as text": (lambda i: entry(i)["parts"][0].update(start="0"), "valid integer"),
    "a number with a fraction": (lambda i: entry(i)["parts"][0].update(start=0.0), "valid integer"),
    "1,000 dimensions": (lambda i: entry(i).update(shape=[1] * 1000), "at most 8 items"),
    **{f"the file {name!r}": (lambda i, name=name: entry(i)["parts"][0].update(file=name), "match pattern")
       for name in ("../rank-00000.bin", "/etc/passwd", "a/b", ".metadata", "", "rank\x1b", "a\n", "x" * 200)},
    "the same bytes under 1,000 names": (
        lambda i: i.update({f"progress.{n}": entry(i) for n in range(1000)}), "does not fit into"),
    "a file that the manifest lacks": (lambda i: entry(i)["parts"][0].update(file="other.bin"), "does not name"),
}  # fmt: skip


@pytest.mark.parametrize("attack", INDICES)
def test_an_index_that_does_not_describe_its_files_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("memory of a tensor is taken, and its bytes are read")

    change, says = INDICES[attack]
    path = saved(tmp_path)
    change_index(path, change)
    checkpoint.check(path)
    monkeypatch.setattr(reader, "_read_into", fail)
    with memory_below(10_000_000):
        for use in (checkpoint.shapes, lambda path: checkpoint.load(path, state(), alone=True)):
            with pytest.raises(UserError, match=says) as refused:
                use(path)
            assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"version": 1}', '{"version": 2, "tensors": {}}', "[" * 100_000, "\x00", "NaN"]
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path)
    (path / "tensors.json").write_text(text)
    reseal(path)
    with pytest.raises(UserError, match=r"tensors\.json is not the index of a checkpoint"):
        checkpoint.load(path, state(), alone=True)


def test_very_many_parts_that_overlap_cost_no_time(tmp_path: Path) -> None:
    path = saved(tmp_path)
    part = {"file": "rank-00000.bin", "start": 0, "sizes": [5, 1]}
    parts = [part | {"offsets": [0, column]} for column in range(30_000)]
    change_index(path, lambda i: entry(i).update(shape=[5, 30_000], parts=parts))
    with pytest.raises(UserError, match="more parts side by side"):
        checkpoint.shapes(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_index_by_hand_is_loaded_as_numpy_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Tensors of any shape and type, in blocks of a grid, in any order and over several files."""
    path = saved(tmp_path_factory.mktemp("checkpoint"))
    kind = data.draw(st.sampled_from(list(NUMPY)))
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    whole = (
        rng.integers(0, 2, shape).astype(NUMPY[kind])
        if kind == "bool"
        else rng.integers(0, 200, shape).astype(NUMPY[kind])
    )
    blocks: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))})
        pairs = list(zip(cuts, cuts[1:], strict=False)) or [(0, 0)]
        blocks = [(*block, slice(*pair)) for block in blocks for pair in pairs]
    contents, parts = {"rank-00000.bin": b"", "rank-00007.bin": b""}, []
    for block in data.draw(st.permutations(blocks)):
        file = data.draw(st.sampled_from(list(contents)))
        contents[file] += bytes(-len(contents[file]) % 64)
        parts.append({"offsets": [s.start for s in block], "sizes": [s.stop - s.start for s in block],
                      "file": file, "start": len(contents[file])})  # fmt: skip
        contents[file] += whole[block].tobytes()
    for file, content in contents.items():
        (path / file).write_bytes(content)
    (path / "tensors.json").write_text(json.dumps({"tensors": {"x": {"dtype": kind, "shape": shape, "parts": parts}}}))
    files = dict.fromkeys((*contents, "tensors.json"), (0, ""))
    (path / "manifest.json").write_text(MANIFEST.sealed(files).model_dump_json())
    reseal(path)
    checkpoint.check(path)
    loaded = {"x": torch.from_numpy(np.zeros(shape, NUMPY[kind]))}
    checkpoint.load(path, loaded, alone=True)
    np.testing.assert_array_equal(loaded["x"].numpy(), whole)


@pytest.fixture(scope="module")
def whole(group: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_manifest_or_index_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, name: str, data: st.DataObject
) -> None:
    """With another manifest the tensors are those saved; another index may find others, in the bytes that were saved."""
    path = Path(shutil.copytree(whole, tmp_path_factory.mktemp("checkpoint") / whole.name))
    text = data.draw(mutated(json.loads((path / name).read_text())))
    (path / name).write_bytes(text)
    if name == "tensors.json":
        reseal(path)
    else:
        with suppress(ValueError, AttributeError):  # the text is no JSON any more, or no object
            content = json.loads(text)
            checksum = config_hash({key: value for key, value in content.items() if key != "checksum"})
            (path / name).write_text(json.dumps(content | {"checksum": checksum}))
    loaded, refused = state(), ""
    try:
        checkpoint.check(path)
        checkpoint.load(path, loaded, alone=True)
    except UserError as error:
        refused = str(error)
    assert not has_controls(refused)
    if refused:
        return
    found = [loaded["model"]["a.weight"], loaded["model"]["ids"], loaded["step"]]
    if name == "manifest.json":
        checkpoint.load(whole, before := state(), alone=True)
        kept = [before["model"]["a.weight"], before["model"]["ids"], before["step"]]
        assert all(map(torch.equal, found, kept))
    numbers = (whole / "rank-00000.bin").read_bytes()
    assert all(tensor.numpy().tobytes() in numbers for tensor in found)


def test_an_index_that_names_the_bytes_of_another_tensor_reads_those(tmp_path: Path) -> None:
    path, loaded = saved(tmp_path), state()
    change_index(path, lambda i: i["model.ids"]["parts"][0].update(start=0))
    checkpoint.check(path)
    checkpoint.load(path, loaded, alone=True)
    assert loaded["model"]["ids"].numpy().tobytes() == (path / "rank-00000.bin").read_bytes()[: 40 * 8]


@pytest.mark.parametrize("name", ["manifest.json", "tensors.json"])
@given(content=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes) -> None:
    path = saved(tmp_path_factory.mktemp("checkpoint"))
    (path / name).write_bytes(content)
    if name == "tensors.json":
        reseal(path)
    with pytest.raises(UserError):
        checkpoint.load(path, state(), alone=True)


def test_the_schema_of_an_index_names_only_numbers() -> None:
    """Whatever is added to the types: none of them is Python's or a string's."""
    kinds = Index.model_json_schema()["$defs"]["TensorEntry"]["properties"]["dtype"]["enum"]
    assert all(isinstance(torch.empty(1, dtype=getattr(torch, kind)).item(), (float, int, bool)) for kind in kinds)


@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_part_does_not_stand_for_the_one_that_begins_with_it(tmp_path: Path, place: int) -> None:
    path, loaded = saved(tmp_path), state()
    wanted = state()
    checkpoint.load(path, wanted, alone=True)

    def insert(index: dict[str, Any]) -> None:
        [part] = entry(index)["parts"]
        empty = part | {"sizes": [0, 5], "start": 64 if part["start"] != 64 else 0}
        entry(index)["parts"].insert(place, empty)

    change_index(path, insert)
    checkpoint.load(path, loaded, alone=True)
    assert torch.equal(loaded["model"]["a.weight"], wanted["model"]["a.weight"])
