"""Tables of a package against the ranker that they are made of, and their formats against arithmetic in float64."""

# Shapes: N rows, D numbers of a row, W bytes of a row, E numbers of all embeddings.

import numpy as np
import packages_by_hand as by_hand
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.serving.row_formats import FORMATS, stored
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


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    for name, weight_RD in by_hand.weights(ranker).items():  # the ranker gets the rows as they are stored
        weight_RD.copy_(torch.from_numpy(decoded(stored(weight_RD, form), form, weight_RD.shape[1])))
        if kept and (row_K := kept.get(name.split("@")[0])) is not None:
            weight_RD[np.setdiff1d(np.arange(len(weight_RD)), row_K)] = 0
    with torch.no_grad():
        wanted_BE = ranker.embedded(batch)
    found_BE = tables.embed(encoded)
    assert found_BE.shape == wanted_BE.shape == (count, tables.width)
    if form in ("fp32", "fp16"):
        assert torch.equal(found_BE, wanted_BE)
    torch.testing.assert_close(found_BE, wanted_BE, rtol=1e-6, atol=1e-6)
