"""Maps of ids to rows against a dictionary a set, one id at a time."""

import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from references.id_map import ReferenceIdMap
from torch import Tensor
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from features.errors import UserError
from features.fit.encoders import Encoders
from features.kinds.tables import Managed
from features.schema.schema import Schema
from models.emm import FusedRanker
from models.id_map import IdMap
from models.managed import ManagedIds
from models.ranker import ModelConfig, Ranker

TOP = 1 << 63
SCHEMA = Schema.parse(
    {
        "source": {"files": "log.csv"},
        "tables": {"item": {"managed": {"rows": 150}}},
        "categorical": {"user": {"hash": 9}, "shown": {"table": "item"}, "page": {"managed": {"rows": 5, "evict": "lfu"}}},
        "bag": {"recent": {"table": "item"}},
        "tasks": {"click": {"kind": "binary", "label": "y"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    },
    "mine.yaml",
)  # fmt: skip


def pooled(ids: list[int]) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Distinct ids ascending with their counts, as tensors and as a dictionary."""
    id_N, count_N = torch.tensor(ids, dtype=torch.int64).unique(return_counts=True)
    return id_N, count_N, dict(zip(id_N.tolist(), count_N.tolist(), strict=True))


@settings(max_examples=examples(60), deadline=None)
@given(st.data(), st.sampled_from(["lru", "lfu"]), st.integers(1, 200), st.integers(1, 400))
def test_a_map_is_what_one_dictionary_a_set_comes_to(data, evict, rows, values):
    managed = Managed(rows=rows, evict=evict)
    whole, twin = IdMap(managed), ReferenceIdMap(managed)
    middle = managed.sets // 2
    parts = [IdMap(managed, 0, middle), IdMap(managed, middle, managed.sets - middle)]
    pool = torch.randint(1, TOP - 1, (values,), generator=torch.Generator().manual_seed(values)).tolist()
    for step in range(1, data.draw(st.integers(1, 8)) + 1):
        id_N, count_N, counts = pooled(data.draw(st.lists(st.sampled_from(pool), max_size=60)))
        assert whole.lookup(id_N).tolist() == [twin.row(id) for id in counts]
        changed = whole.admit(id_N, count_N, step)
        assert sorted(changed.tolist()) == sorted(twin.admit(counts, step))
        low_N = (id_N >> 32) * managed.sets < middle << 31
        for part, own_N in zip(parts, (low_N, ~low_N), strict=True):
            part.admit(id_N[own_N], count_N[own_N], step)
    assert whole.lookup(torch.tensor(pool)).tolist() == [twin.row(id) for id in pool]
    for name in ("id_SW", "used_SW"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


@pytest.mark.parametrize("evict", ["lru", "lfu"])
def test_a_stream_of_ever_new_ids_finds_a_row_for_each_that_is_alive(evict):
    managed = Managed(rows=1000, evict=evict)
    map_, generator = IdMap(managed), torch.Generator().manual_seed(1)
    day_DN = torch.randint(1, TOP - 1, (12, 300), generator=generator)
    for day, alive_N in enumerate(zip(day_DN[:-1], day_DN[1:], strict=True)):
        id_N = torch.cat(alive_N).unique()
        for step in range(3 * day + 1, 3 * day + 4):
            map_.admit(id_N, torch.ones_like(id_N), step)
        row_N = map_.lookup(id_N)
        assert (row_N > 1).all()
        assert len(row_N.unique()) == len(id_N) == 600
        assert 2 <= row_N.min() < row_N.max() < 2 + managed.sets * managed.ways
    gone_N = day_DN[:6].flatten()
    assert (map_.lookup(gone_N) == 1).float().mean() > 0.9, "twelve times 300 ids went through 1,024 rows"


def test_space_saving_keeps_what_is_frequent_and_lru_what_is_recent():
    often, kept = torch.tensor([5]), {}
    for evict in ("lfu", "lru"):
        map_ = IdMap(Managed(rows=8, evict=evict))
        map_.admit(often, torch.tensor([100]), 1)
        for step in range(2, 22):  # each of them once
            map_.admit(torch.tensor([1000 + step]), torch.tensor([1]), step)
        kept[evict] = map_.lookup(often).item() > 1
        assert (map_.lookup(torch.arange(1014, 1022)) > 1).sum() == (7 if evict == "lfu" else 8)
    assert kept == {"lfu": True, "lru": False}


def batch(ids: list[list[list[int]]]) -> KeyedJaggedTensor:
    """From a list of ids a row and key."""
    rows = [row for key in ids for row in key]
    return KeyedJaggedTensor(
        keys=["user", "shown", "page", "recent"],
        values=torch.tensor([id for row in rows for id in row]),
        lengths=torch.tensor([len(row) for row in rows]),
        stride=2,
    )


def test_shared_tables_bags_and_missing_values_are_looked_up_where_their_ids_are():
    managed = ManagedIds(SCHEMA)
    a, b, c = (TOP // 7 * k for k in (1, 3, 5))
    sparse = batch([[[4], [8]], [[a], [b]], [[0], [c]], [[b, b, 0], [a]]])
    assert managed(sparse).values().tolist() == [4, 8, 1, 1, 0, 1, 1, 1, 0, 1], (
        "nothing has a row before the first step"
    )
    changed = {name: rows.tolist() for name, rows in managed.admit(1).items()}
    # 150 rows are 3 sets of 50, in which a, b and c come first.
    assert changed == {"item": [2, 52], "page": [2]}
    found = managed(batch([[[4], [8]], [[a], [b]], [[0], [c]], [[b, b, 0], [c]]]))
    assert found.values().tolist() == [4, 8, 2, 52, 0, 2, 52, 52, 0, 1]
    assert found.lengths().tolist() == [1, 1, 1, 1, 1, 1, 3, 1]
    assert managed.maps["item"].used_SW.max() == 1
    assert managed.maps["page"].used_SW.max() == 1, "a missing value was counted"


def test_evaluation_looks_up_and_changes_nothing():
    managed = ManagedIds(SCHEMA)
    sparse = batch([[[4], [8]], [[11], [22]], [[33], [33]], [[], []]])
    managed.eval()
    managed(sparse)
    assert managed.admit(1) == {}
    managed.train()
    managed(sparse)
    managed.admit(2)
    before = {name: value.clone() for name, value in managed.state_dict().items()}
    managed.eval()
    rows = managed(batch([[[4], [8]], [[44], [22]], [[33], [55]], [[], []]])).values().tolist()
    assert rows == [4, 8, 1, managed.maps["item"].lookup(torch.tensor([22])).item(), 2, 1]
    assert managed.admit(3) == {}
    assert all(torch.equal(value, before[name]) for name, value in managed.state_dict().items())


def of_rows(sparse: KeyedJaggedTensor) -> Batch:
    return Batch(sparse, torch.zeros(2, 0), torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2, 1), torch.arange(2))


@pytest.mark.parametrize("pooling", ["mean", "sequence"])
def test_a_ranker_reads_the_rows_that_its_maps_name(pooling):
    content = SCHEMA.model_dump(exclude_unset=True)
    content["bag"]["recent"]["pooling"] = pooling
    schema = Schema.parse(content, "mine.yaml")
    content["tables"]["item"], content["categorical"]["page"] = {"hash": 151}, {"hash": 6}  # as many rows
    plain = Schema.parse(content, "plain.yaml")
    config = ModelConfig(fusion={"name": "shared_bottom", "widths": [4]}, tower=[4], embedding_std=1.0)
    ours, theirs = (Ranker(s, Encoders(s, {}, {}, {}), config, device="cpu") for s in (schema, plain))
    weights = {name: value for name, value in ours.state_dict().items() if not name.startswith("managed.")}
    assert weights.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(weights)
    a, b, c = (TOP // 7 * k for k in (1, 3, 5))
    sparse = batch([[[4], [8]], [[a], [b]], [[0], [c]], [[b, b, a], [a]]])
    ours(of_rows(sparse))
    ours.managed.admit(1)
    rows = batch([[[4], [8]], [[2], [52]], [[0], [2]], [[52, 52, 2], [2]]])
    assert torch.equal(ours(of_rows(sparse)), theirs(of_rows(rows)))


def test_fused_models_are_refused():
    source = {"run": "r", "step": 1, "task": "click", "model": {"fusion": {"name": "mmoe"}}}
    config = ModelConfig.model_validate({"fusion": {"name": "emm", "sources": [source]}})
    with pytest.raises(UserError, match="table item: fusion emm supports no managed ids"):
        FusedRanker(SCHEMA, None, config)
