"""Deltas: applied to their base they give the bytes of the whole package, in a folder and in memory."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import packages_by_hand as by_hand
import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from pipeline.release.export import tables as exported
from pipeline.serving.deltas import apply_delta
from pipeline.serving.manifest import Manifest, read_manifest, write_manifest
from pipeline.serving.row_formats import FORMATS
from pipeline.serving.tables import Tables


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(by_hand.CASES)), st.sampled_from(FORMATS), st.integers(0, 99), st.booleans())
def test_a_package_and_its_deltas_are_the_later_packages_byte_by_byte(tmp_path_factory, case, form, seed, pruned):
    folder, rng = tmp_path_factory.mktemp("delta"), np.random.default_rng(seed)
    ranker, kept = by_hand.ranker_of(case, seed), by_hand.some_rows(case, seed) if pruned else None
    encoded, _ = by_hand.rows_of(case, ranker, 5, seed)
    wholes, deltas = [], []
    with mock.patch.object(exported, "BLOCK_BYTES", 1000):
        for step in (3, 4, 5):
            run = by_hand.save(folder / "run", step, ranker, seed + step)
            wholes.append(
                (folder / f"whole {step}", by_hand.export(run, step, case, form, folder / f"whole {step}", kept))
            )
            if step > 3:
                delta = folder / f"delta {step}"
                before = deltas[-1][1] if deltas else wholes[0][1]
                deltas.append((delta, by_hand.export_delta(run, step, before, case, delta, kept)))
            by_hand.train(ranker, rng)
    base = wholes[0][0]
    for (delta, manifest), (whole, wanted), count in zip(deltas, wholes[1:], (1, 2), strict=True):
        out = folder / f"applied {count}"
        assert apply_delta(base, delta, out) == wanted == manifest.whole()
        assert contents(out) == contents(whole)
        found = Tables.open(*wholes[0], *deltas[:count]).embed(encoded)
        assert torch.equal(found, Tables.open(whole, wanted).embed(encoded))
        base = out
    assert contents(wholes[0][0]) == contents(folder / "whole 3")


class World(NamedTuple):
    """A package of step 3, and a delta from it to step 4."""

    base: Path
    base_manifest: Manifest
    delta: Path
    manifest: Manifest

    def changed_copy(self, tmp_path: Path) -> "World":
        """To damage."""
        for name in ("base", "delta"):
            shutil.copytree(getattr(self, name), tmp_path / name)
        return self._replace(base=tmp_path / "base", delta=tmp_path / "delta")

    def sealed(self) -> Manifest:
        """The delta's manifest again, with the checksums of its files as they are now."""
        return write_manifest(self.delta, self.manifest, list(self.manifest.files))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("deltas")
    ranker = by_hand.ranker_of("pooled")
    by_hand.export(by_hand.save(folder / "run", 3, ranker), 3, "pooled", "int8", folder / "base")
    base = read_manifest(folder / "base")
    by_hand.train(ranker, np.random.default_rng(2))
    delta = by_hand.export_delta(by_hand.save(folder / "run", 4, ranker), 4, base, "pooled", folder / "delta")
    assert {"tables/dim-00004.bin.rows", "tables/dim-00008.bin.rows"} <= delta.files.keys()
    return World(folder / "base", base, folder / "delta", delta)


def refused(world: World, out: Path, says: str, manifest: Manifest | None = None) -> None:
    """By both ways to apply a delta, neither of which leaves anything."""
    before = contents(world.base)
    with pytest.raises(UserError, match=says):
        apply_delta(world.base, world.delta, out)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == []
    if manifest:
        with pytest.raises(UserError, match=says):
            Tables.open(world.base, world.base_manifest, (world.delta, manifest))
    assert contents(world.base) == before


def test_a_delta_is_refused_by_any_package_but_its_base(world, tmp_path):
    other = world.changed_copy(tmp_path)
    base = write_manifest(
        other.base, world.base_manifest.model_copy(update={"versions": {"torch": "0"}}), [*world.base_manifest.files]
    )
    refused(
        other._replace(base_manifest=base),
        tmp_path / "out",
        "Apply it to the one that it was exported against",
        world.manifest,
    )
    with pytest.raises(UserError, match="is a whole package, no delta"):
        apply_delta(world.base, world.base, tmp_path / "out")
    whole = apply_delta(world.base, world.delta, tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        apply_delta(world.base, world.delta, tmp_path / "out")
    with pytest.raises(UserError, match="Apply it to the one"):
        Tables.open(tmp_path / "out", whole, (world.delta, world.manifest))


@pytest.mark.parametrize("name", ["tables/dim-00004.bin.rows", "tables/dim-00004.bin", "tables/ids-00000.bin"])
def test_a_delta_with_a_file_that_was_cut_is_refused(world, tmp_path, name):
    cut = world.changed_copy(tmp_path)
    os.truncate(cut.delta / name, (cut.delta / name).stat().st_size - 8)
    refused(cut, tmp_path / "out", "bytes, the manifest says", world.manifest)
    refused(
        cut, tmp_path / "out", "has .* bytes|is another than was exported", cut.sealed() if "ids" not in name else None
    )


@pytest.mark.parametrize(("place", "row"), [(-1, 10**6), (0, -1), (1, 0), (-1, 1 << 62)])
def test_rows_that_a_file_does_not_have_are_never_written(world, tmp_path, place, row):
    forged = world.changed_copy(tmp_path)
    row_N = np.fromfile(forged.delta / "tables/dim-00004.bin.rows", np.int64)
    row_N[place] = row
    row_N.tofile(forged.delta / "tables/dim-00004.bin.rows")
    refused(forged, tmp_path / "out", "rows that do not ascend, or beyond", forged.sealed())


def test_rows_of_a_file_that_holds_no_tables_are_not_read_as_such(world, tmp_path):
    forged = world.changed_copy(tmp_path)
    np.arange(3).tofile(forged.delta / "dense.pt2.rows")
    write_manifest(forged.delta, forged.manifest, [*forged.manifest.files, "dense.pt2.rows"])
    out = tmp_path / "out"
    apply_delta(forged.base, forged.delta, out)
    assert (out / "dense.pt2").read_text() == "of step 4"


def test_a_base_that_changed_gives_no_package(world, tmp_path):
    damaged = world.changed_copy(tmp_path)
    file = damaged.base / "tables/dim-00004.bin"
    content = bytearray(file.read_bytes())
    unchanged = set(range(10)) - set(np.fromfile(world.delta / "tables/dim-00004.bin.rows", np.int64).tolist())
    content[min(unchanged) * 12] ^= 1
    file.write_bytes(content)
    refused(damaged, tmp_path / "out", r"its tables/dim-00004.bin is another than was exported")


def test_a_delta_is_not_written_for_a_package_that_is_no_export_of_the_earlier_step(world, tmp_path):
    ranker = by_hand.ranker_of("pooled", 1)
    for step in (3, 4):
        run = by_hand.save(tmp_path / "run", step, ranker)
    with pytest.raises(UserError, match=r"the package of step 3 has another tables/dim-00004.bin than an export"):
        by_hand.export_delta(run, 4, world.base_manifest, "pooled", tmp_path / "delta")
    assert not (tmp_path / "delta/manifest.json").exists()


def test_what_did_not_change_is_not_in_a_delta(world, tmp_path):
    ranker = by_hand.ranker_of("pooled")
    by_hand.weights(ranker)["item"][7] += 1
    run = by_hand.save(tmp_path / "run", 3, by_hand.ranker_of("pooled"))
    by_hand.save(tmp_path / "run", 4, ranker)
    delta = by_hand.export_delta(run, 4, world.base_manifest, "pooled", tmp_path / "delta")
    sizes = {name: file.bytes for name, file in delta.files.items() if name.startswith("tables/dim")}
    assert sizes == {"tables/dim-00008.bin": 16, "tables/dim-00008.bin.rows": 8}
    assert np.fromfile(tmp_path / "delta/tables/dim-00008.bin.rows", np.int64).tolist() == [
        delta.tables["item"].first + 7
    ]


def test_a_delta_may_have_a_file_of_tables_whole(world, tmp_path):
    rows = world.changed_copy(tmp_path)
    apply_delta(rows.base, rows.delta, tmp_path / "wanted")
    name = "tables/dim-00004.bin"
    shutil.copy(tmp_path / "wanted" / name, rows.delta / name)
    names = [other for other in rows.manifest.files if other != f"{name}.rows"]
    manifest = write_manifest(rows.delta, rows.manifest, names)
    apply_delta(rows.base, rows.delta, tmp_path / "found")
    assert contents(tmp_path / "found") == contents(tmp_path / "wanted")
    encoded, _ = by_hand.rows_of("pooled", by_hand.ranker_of("pooled"), 9, 0)
    wanted_BE = Tables.open(tmp_path / "wanted", read_manifest(tmp_path / "wanted")).embed(encoded)
    assert torch.equal(Tables.open(rows.base, rows.base_manifest, (rows.delta, manifest)).embed(encoded), wanted_BE)
