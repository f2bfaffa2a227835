"""Training with managed tables: against plain dictionaries, one rank against two, a run against itself after a stop."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from references.id_map import ReferenceIdMap
from tiny_training import assert_close, assert_identical, last, torchrun
from two_ranks import stopped
from two_ranks_managed import ADAGRAD, HALF, STEPS, STOP, counted, logits, make_managed_dataset, trainer

from features.errors import UserError
from features.kinds.tables import Managed
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Position
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

FEATURES = {"item": ("shown", "recent"), "user": ("user",)}


class Watched:
    """A trainer beside which plain dictionaries give rows to the ids of each batch.

    It keeps, of each step and table: what changed hands, and the table before and after.
    """

    def __init__(self, made: Trainer) -> None:
        self.learner = made.learner
        settings = {"item": Managed(rows=130), "user": Managed(rows=30, evict="lfu")}
        self.twins = {table: ReferenceIdMap(managed) for table, managed in settings.items()}
        self.steps_seen: list[dict[str, tuple]] = []
        self.batch: dict[str, Counter] = {}
        self.after_step, self.learner.managed.after_step = self.learner.managed.after_step, self._after_step
        self.batches, made.loader.batches = made.loader.batches, self._batches

    def _after_step(self, step: int) -> None:
        before = {table: self._table(table) for table in FEATURES}
        self.after_step(step)
        changed = {table: self.twins[table].admit(self.batch[table], step) for table in FEATURES}
        self.steps_seen.append({table: (changed[table], before[table], self._table(table)) for table in FEATURES})

    def _batches(self, position: Position) -> Iterator:
        for batch in self.batches(position):
            values = {name: batch.sparse[name].values().tolist() for name in list(batch.sparse.keys())}
            self.batch = {
                t: Counter(id for name in names for id in values[name] if id) for t, names in FEATURES.items()
            }
            yield batch

    def _table(self, table: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and momentum, as a checkpoint would have them."""
        state, name = self.learner.state(), f"embeddings.embedding_bags.{table}.weight"
        momentum = state["tables"][f"ranker.{name}"][f"{table}.momentum1"]
        return tuple(found.local_shards()[0].tensor.clone() for found in (state["model"][name], momentum))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("managed")
    make_managed_dataset(path / "data")
    return path


@pytest.fixture(scope="module")
def one(folder: Path) -> Watched:
    made = trainer(folder, "one")
    watched = Watched(made)
    made.run_to_end()
    logits(folder, made, "one")
    return watched


@pytest.fixture(scope="module")
def two_ranks(folder: Path, one: Watched) -> Path:
    done = torchrun(str(Path(__file__).with_name("two_ranks_managed.py")), str(folder))
    assert done.returncode == 0
    return folder


def test_rows_go_to_the_ids_that_plain_dictionaries_give_them_to_and_start_afresh(one: Watched):
    taken_over = Counter()
    for seen in one.steps_seen:
        for table, (changed, (weight_RD, momentum_R), (after_RD, after_R)) in seen.items():
            rows = sorted(changed)
            others = torch.ones(len(weight_RD), dtype=torch.bool).index_fill_(
                0, torch.tensor(rows, dtype=torch.int64), False
            )
            assert torch.equal(after_RD[rows], weight_RD[1].expand(len(rows), -1))
            assert not after_R[rows].any()
            assert torch.equal(after_RD[others], weight_RD[others])
            assert torch.equal(after_R[others], momentum_R[others])
            taken_over[table] += int((momentum_R[rows] > 0).sum())
    assert len(one.steps_seen) == STEPS
    assert min(taken_over.values()) > 30, "hardly a row had another id before"
    for table, twin in one.twins.items():
        found = one.learner.ranker.managed.maps[table].id_SW.tolist()
        assert found == [[id or 0 for id, _ in slots] for slots in twin.sets]


def test_two_ranks_give_every_id_the_row_that_one_rank_gives_it(two_ranks: Path):
    same(two_ranks / "mixed", two_ranks / "one")


def test_a_table_in_columns_or_in_replicas_has_its_rows_start_afresh_too(two_ranks: Path):
    trainer(two_ranks, "one-adagrad", tables=ADAGRAD).run_to_end()
    same(two_ranks / "adagrad", two_ranks / "one-adagrad")


def test_messages_of_maps_do_not_depend_on_the_number_of_tables_and_waits_are_few(two_ranks: Path):
    ranks = [json.loads((two_ranks / f"counted.{rank}.json").read_text()) for rank in range(2)]
    # Sizes of the ids and of the new rows, and five a table; it was 55. Rank 1 has no part of one table.
    assert [rank.pop("waits") for rank in ranks] == [2 + 2 * 5, 2 + 2 * 5 - 1]
    # Sizes, ids and rows; sizes and rows; weights. It was 5, 2 and 1 a table.
    assert ranks == [{"alltoall_base": 3, "_allgather_base": 2, "allreduce": 1}] * 2
    assert counted(two_ranks, "counted-alone") == {"waits": 2 * 4}  # it was 35


def test_a_table_in_16_bits_has_its_rows_start_afresh_too(two_ranks: Path):
    trainer(two_ranks, "one-half", tables=HALF).run_to_end()
    same(two_ranks / "half", two_ranks / "one-half", rtol=2e-3, atol=2e-4)
    assert last(two_ranks / "half")["model.embeddings.embedding_bags.item.weight"].dtype == torch.float16


def test_a_killed_run_goes_on_bit_for_bit(two_ranks: Path):
    stopped(two_ranks, "one", "one-resumed", STOP)
    trainer(two_ranks, "one-resumed").run_to_end()
    assert_identical(last(two_ranks / "one-resumed"), last(two_ranks / "one"))
    assert_identical(last(two_ranks / "resumed"), last(two_ranks / "mixed"))


def test_a_run_goes_on_with_more_ranks_or_fewer(two_ranks: Path):
    same(two_ranks / "widened", two_ranks / "one")
    stopped(two_ranks, "mixed", "narrowed", STOP)
    trainer(two_ranks, "narrowed").run_to_end()
    same(two_ranks / "narrowed", two_ranks / "mixed")


@pytest.mark.parametrize("name", ["one", "mixed"])
def test_a_scorer_sees_the_logits_that_the_trainer_sees(two_ranks: Path, name: str):
    found: dict[int, torch.Tensor] = {}
    scorer = Scorer(Run(two_ranks / name), Dataset(two_ranks / "data"), "valid", 7)
    scorer.metrics(
        STEPS, on_batch=lambda batch, logit_BT: found.update(zip(batch.row_id_B.tolist(), logit_BT, strict=True))
    )
    parts = [torch.load(path) for path in sorted(two_ranks.glob(f"{name}.logits.*.pt"))]
    theirs = {row: logit for ids, logits in parts for row, logit in zip(ids.tolist(), logits, strict=True) if row >= 0}
    assert len(theirs) == 51
    for row, logit_T in theirs.items():
        torch.testing.assert_close(found[row], logit_T, rtol=1e-5, atol=1e-6)


def test_what_managed_tables_do_not_go_with_is_refused(two_ranks: Path):
    with pytest.raises(UserError, match=r"train\.pipelined: table item is managed"):
        trainer(two_ranks, "refused", pipelined=True)
    with pytest.raises(UserError, match=r"train\.kernels\.user: table user is managed"):
        trainer(two_ranks, "refused", kernels={"user": ["fused_uvm_caching", "fused"]})
    assert "train.sharding_group: table item is managed" in (two_ranks / "refused.txt").read_text()


def same(found: Path, wanted: Path, **bounds: float) -> None:
    """Asserts that two runs ended with the same rows for the same ids, and with weights that differ by rounding."""
    found_state, wanted_state = last(found), last(wanted)
    for name in (n for n in wanted_state if ".managed." in n):
        assert torch.equal(found_state[name], wanted_state[name]), name
    assert_close(found_state, wanted_state, **bounds)
