"""Deltas: applied to their base they give the bytes of the whole package, in a folder and in memory."""

from pathlib import Path
from unittest import mock

import numpy as np
import packages_by_hand as by_hand
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.release.export import tables as exported
from pipeline.serving.deltas import apply_delta
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
                deltas.append((delta, by_hand.export_delta(run, step, wholes[-2][1], case, delta, kept)))
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
