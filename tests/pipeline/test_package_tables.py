"""Tables of a package against the ranker that they are made of, and their formats against arithmetic in float64."""

# Shapes: N rows, D numbers of a row, W bytes of a row, E numbers of all embeddings.

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import packages_by_hand as by_hand
import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from features.errors import UserError
from features.fit.encoders import Encoders
from features.schema.schema import Schema
from models.ranker import Ranker
from pipeline.release.export import tables as exported
from pipeline.release.export.tolerances import bounds_of, row_bounds
from pipeline.serving import kept_rows
from pipeline.serving.encoded import Encoded, Lists, concatenated
from pipeline.serving.manifest import Manifest
from pipeline.serving.row_formats import FORMATS, looked_up, row_bytes, stored
from pipeline.serving.tables import Tables


def decoded(byte_NW: Tensor, form: str, dim: int) -> np.ndarray:
    """value_ND, float64, from the bytes alone."""
    byte_NW = byte_NW.numpy()
    if form in ("fp32", "fp16"):
        return byte_NW.view(f"<f{2 if form == 'fp16' else 4}").astype(np.float64)
    tail = 8 if form == "int8" else 4
    scale_N2 = np.ascontiguousarray(byte_NW[:, -tail:]).view(f"<f{tail // 2}").astype(np.float64)
    number_ND = byte_NW[:, :-tail].astype(np.float64)
    if form == "int4":
        pairs = byte_NW[:, :-tail]
        number_ND = np.stack([pairs & 15, pairs >> 4], 2).reshape(len(pairs), -1)[:, :dim].astype(np.float64)
    return number_ND * scale_N2[:, :1] + scale_N2[:, 1:]


@settings(max_examples=examples(24), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(by_hand.CASES)), st.sampled_from(FORMATS), st.integers(0, 9), st.sampled_from([1, 2, 7]),
    st.booleans(),
)  # fmt: skip
def test_a_package_embeds_rows_as_the_ranker_of_its_checkpoint(tmp_path_factory, case, form, seed, count, pruned):
    folder = tmp_path_factory.mktemp("package")
    ranker = by_hand.ranker_of(case, seed)
    run = by_hand.save(folder / "run", 3, ranker, seed)
    kept = by_hand.some_rows(case, seed) if pruned else None
    manifest = by_hand.export(run, 3, case, form, folder / "package", kept)
    tables = Tables.open(folder / "package", manifest)
    encoded, batch = by_hand.rows_of(case, ranker, count, seed)
    held = {name: np.arange(len(weight_RD)) for name, weight_RD in by_hand.weights(ranker).items()}
    with torch.no_grad():
        exact_BE = ranker.embedded(batch)
        bound_BE = bounds_of(ranker, by_hand.schema_of(case), held, form, kept).embedded(batch)
    for name, weight_RD in by_hand.weights(ranker).items():  # the ranker gets the rows as they are stored
        weight_RD.copy_(torch.from_numpy(decoded(stored(weight_RD, form), form, weight_RD.shape[1])))
        if kept and (row_K := kept.get(name.split("@")[0])) is not None:
            weight_RD[np.setdiff1d(np.arange(len(weight_RD)), row_K)] = 0
    with torch.no_grad():
        wanted_BE = ranker.embedded(batch)
    found_BE = tables.embed(encoded)
    assert found_BE.shape == wanted_BE.shape == (count, tables.width)
    assert ((found_BE - exact_BE).abs() <= bound_BE).all()
    if form in ("fp32", "fp16"):
        assert torch.equal(found_BE, wanted_BE)
    torch.testing.assert_close(found_BE, wanted_BE, rtol=1e-6, atol=1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(1, 40), st.sampled_from([4, 8, 12, 64]), st.integers(0, 10**6))
def test_rows_of_fewer_bits_are_fbgemms_and_no_further_from_the_numbers_than_their_scale_allows(count, dim, seed):
    rng = np.random.default_rng(seed)
    scale_N1 = 10.0 ** rng.integers(-4, 4, (count, 1))
    value_ND = torch.from_numpy(
        (rng.normal(size=(count, dim)) * scale_N1 + rng.normal(size=(count, 1))).astype(np.float32)
    )
    value_ND[0] = value_ND[0, 0]  # a row of one number
    wanted = {
        "int8": torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(value_ND),
        "int4": torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(value_ND, 4),
    }
    read = {
        "int8": torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(wanted["int8"]),
        "int4": torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(wanted["int4"], 4),
    }
    row_N = torch.from_numpy(rng.integers(0, count, 9))
    for form in FORMATS:
        byte_NW = stored(value_ND, form)
        assert byte_NW.shape == (count, row_bytes(form, dim))
        exact_ND = decoded(byte_NW, form, dim)
        found_ND = looked_up(byte_NW, row_N, form)
        assert found_ND.dtype == torch.float32
        np.testing.assert_allclose(found_ND, exact_ND[row_N], rtol=1e-6, atol=1e-6 * np.abs(exact_ND).max())
        if form in wanted:
            assert torch.equal(byte_NW, wanted[form])
            torch.testing.assert_close(
                found_ND, read[form][row_N], rtol=1e-6, atol=1e-6 * float(np.abs(exact_ND).max())
            )
        low_N, high_N = (np.float64(edge(1)) for edge in (value_ND.numpy().min, value_ND.numpy().max))
        step_N = (high_N - low_N) / {"int8": 255, "int4": 15}.get(form, np.inf)
        rounding_N = np.maximum(np.abs(low_N), np.abs(high_N)) * {"fp32": 0, "int8": 1e-6}.get(form, 2.0**-10)
        assert (np.abs(exact_ND - value_ND.numpy()).max(1) <= 0.51 * step_N + rounding_N).all()
        assert (np.abs(exact_ND - value_ND.numpy()) <= row_bounds(value_ND, form).numpy()).all()


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1)), min_size=1, max_size=3), st.integers(0, 10**6))
def test_rows_that_are_kept_are_found_and_no_others(tables, seed):
    rng, before, bits, number, wanted = np.random.default_rng(seed), 0, [], [], []
    for size, share in tables:
        id_K = np.flatnonzero(rng.random(size) < share)
        number += [64 * sum(map(len, bits)) + id for id in range(size)]
        row = {id: before + place for place, id in enumerate(id_K.tolist())}
        wanted += [row.get(id, kept_rows.ABSENT) for id in range(size)]
        bits.append(kept_rows.bits_of(id_K, size, before))
        before += len(id_K)
    found = kept_rows.rows_of(np.array(number), np.concatenate(bits), max(before, 1))
    assert found.tolist() == wanted
    forged = rng.integers(0, 1 << 63, np.concatenate(bits).shape).astype(np.uint64) * np.uint64(2)
    assert set(kept_rows.rows_of(np.array(number), forged, max(before, 1)).tolist()) <= {-1, *range(max(before, 1))}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Ranker]:
    """With rows left out of all tables but managed ones."""
    folder = tmp_path_factory.mktemp("package")
    ranker = by_hand.ranker_of("sequences")
    run = by_hand.save(folder / "run", 3, ranker)
    kept = by_hand.some_rows("sequences", 1)
    return folder / "package", by_hand.export(run, 3, "sequences", "fp32", folder / "package", kept), ranker


@pytest.mark.parametrize(
    ("feature", "id"), [("user", 30), ("user", -1), ("shown", 41), ("at", -5), ("topics", 7), ("words", 1 << 40)]
)
def test_an_id_that_a_table_does_not_have_is_refused(package, feature, id):
    folder, manifest, ranker = package
    tables, (encoded, _) = Tables.open(folder, manifest), by_hand.rows_of("sequences", ranker, 6, 0)
    tables.embed(encoded)
    schema = by_hand.schema_of("sequences")
    if feature in schema.single:
        encoded.id_BF[4, [*schema.single].index(feature)] = id
    else:
        encoded.lists[feature].id_V[-1] = id
    with pytest.raises(UserError, match=f"an id of {feature} is {id}, its table has"):
        tables.embed(encoded)


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_lists_that_rows_share_are_embedded_as_those_of_each_row(package, rows, data):
    folder, manifest, ranker = package
    encoded, _ = by_hand.rows_of("sequences", ranker, len(rows), 1)
    place_B = torch.tensor([place for place, times in enumerate(rows) for _ in range(times)], dtype=torch.int64)
    own, shared = {}, {}
    for name, lists in encoded.lists.items():
        ids = lists.id_V.split(lists.length_R.tolist())
        shared[name] = lists._replace(rows_R=torch.tensor(rows))
        own[name] = Lists(torch.cat([lists.id_V[:0], *(ids[place] for place in place_B)]), lists.length_R[place_B])
    each, once = (Encoded(encoded.id_BF[place_B], x, encoded.dense_BD[place_B]) for x in (own, shared))
    first = data.draw(st.integers(0, len(once)))
    last = data.draw(st.integers(first, len(once)))
    tables = Tables.open(folder, manifest)
    assert torch.equal(tables.embed(once), tables.embed(each))
    assert torch.equal(tables.embed(once.slice(first, last)), tables.embed(each.slice(first, last)))
    parts = [once.slice(first, last), each.slice(0, last), once.slice(last, len(once))]
    assert torch.equal(
        tables.embed(concatenated(parts)),
        tables.embed(concatenated([each.slice(first, last), each.slice(0, last), each.slice(last, len(each))])),
    )


def test_rows_of_another_schema_are_refused_and_none_embeds_as_none(package):
    folder, manifest, ranker = package
    tables = Tables.open(folder, manifest)
    encoded, _ = by_hand.rows_of("sequences", ranker, 6, 0)
    with pytest.raises(UserError, match="4 ids, the package's tables read 5"):
        tables.embed(replace(encoded, id_BF=encoded.id_BF[:, 1:]))
    lists = {name: Lists(own.id_V[:0], own.length_R[:0]) for name, own in encoded.lists.items()}
    none = Encoded(encoded.id_BF[:0], lists, encoded.dense_BD[:0])
    assert tables.embed(none).shape == (0, tables.width)


def changed(manifest: Manifest, path: str, value: object) -> Manifest:
    """With the value at a path of keys and places."""
    content = manifest.model_dump(mode="json")
    *keys, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    inner = content
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return Manifest.model_validate(content)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("tables.user.rows", 10**15, "table user has 1,000,000,000,000,000 rows of 30"),
        ("tables.user.num_embeddings", 10**15, "dim-00004.kept has 48 bytes"),
        ("tables.item.first", 3, "does not begin where the one before it ends"),
        ("tables.item.dim", 4, "or has another dim"),
        ("tables.page.num_embeddings", 10**15, "table page has 152 rows of"),
        ("tables.page.ids", "tables/dim-00004.bin", "has 2,768 bytes, the manifest's tables 1,200"),
        ("tables.page.ids", "tables/none.bin", "which is none of its files"),
        ("tables.user.kept", None, "table user has .* rows of 30"),
        ("lookups.0.table", "none", "in none, which is no table"),
        ("lookups.0.pooling", "sequence", "a sequence before others"),
        ("lookups.8.max_length", 10**9, "numbers of embeddings a row"),
        ("lookups", [], "no look-up"),
        ("sets", 3, "dim is no multiple of 3 sets|with several sets"),
        ("format", "int8", "bytes, its tables"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_its_files_is_refused(package, path, value, says):
    folder, manifest, _ = package
    with pytest.raises(UserError, match=says):
        Tables.open(folder, changed(manifest, path, value))


@pytest.mark.parametrize("name", ["dim-00004.bin", "dim-00008.kept", "ids-00000.bin"])
def test_files_that_are_cut_missing_or_links_are_refused(package, tmp_path, name):
    folder, manifest, _ = package
    shutil.copytree(folder, tmp_path / "package")
    file = tmp_path / "package" / "tables" / name
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=f"{name} has .* bytes, the manifest says"):
        Tables.open(tmp_path / "package", manifest)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Tables.open(tmp_path / "package", manifest)
    file.symlink_to(folder / "tables" / name)
    with pytest.raises(UserError, match=f"{name} is a link"):
        Tables.open(tmp_path / "package", manifest)


@pytest.mark.parametrize(
    ("value", "form", "says"),
    [
        (float("nan"), "fp32", "not finite"),
        (float("-inf"), "int8", "not finite"),
        (7e4, "fp16", "beyond the range of fp16"),
        (2e6, "int4", "beyond the range of int4"),
        (-7e4, "int4", "beyond the range of int4"),
    ],
)
def test_numbers_that_a_format_does_not_have_are_refused_with_the_table(tmp_path, value, form, says):
    ranker = by_hand.ranker_of("pooled")
    by_hand.weights(ranker)["topics"][5, 2] = value
    run = by_hand.save(tmp_path / "run", 3, ranker)
    with pytest.raises(UserError, match=f"table topics, rows 0 to 6: a number that is {says}"):
        by_hand.export(run, 3, "pooled", form, tmp_path / "package")


def test_tables_are_written_in_blocks_of_bounded_memory(tmp_path):
    ranker = by_hand.ranker_of("sets")
    run = by_hand.save(tmp_path / "run", 3, ranker)
    whole = by_hand.export(run, 3, "sets", "int8", tmp_path / "whole")
    with (
        mock.patch.object(exported, "BLOCK_BYTES", 1 << 10),
        mock.patch.object(exported, "stored", wraps=exported.stored) as blocks,
    ):
        assert by_hand.export(run, 3, "sets", "int8", tmp_path / "parts") == whole
    sizes = [call.args[0].nbytes for call in blocks.call_args_list]
    assert max(sizes) <= 1 << 10
    assert sum(sizes) == sum(weight.nbytes for weight in by_hand.weights(ranker).values())


def test_ids_of_missing_and_unknown_values_keep_their_rows():
    content = by_hand.PLAIN | {
        "categorical": {"a": {}, "b": {"hash": 9}, "c": {"vocabulary": {"unknown": 3}}},
        "bag": {},
    }
    dataset = mock.Mock(encoders=Encoders(Schema.parse(content | {"tables": {}}, "kept.yaml"), {}, {}, {}))
    seen = {name: np.array([0, 5]) for name in "abc"}
    with mock.patch.object(exported, "needed_rows", return_value=seen) as needed:
        found = exported.occurring_rows(dataset)
    needed.assert_called_once_with(dataset, ["train"])
    assert {name: id_K.tolist() for name, id_K in found.items()} == {"a": [0, 1, 5], "b": [0, 5], "c": [0, 1, 2, 3, 5]}


@pytest.mark.parametrize("ids", [[1, 2], [0, 2, 2], [0, 30], []])
def test_rows_to_keep_that_are_none_of_the_table_are_refused(tmp_path, ids):
    kept = {"user": np.array(ids, np.int64)}
    with pytest.raises(UserError, match="table user has 30 rows: the rows to keep"):
        exported.table_files(by_hand.meta_ranker("pooled"), by_hand.schema_of("pooled"), kept)
