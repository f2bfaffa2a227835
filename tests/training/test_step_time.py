"""Step times against numbers worked out by hand, and what must hold of any."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import SCHEMA

from features.errors import UserError
from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.training.parallel import row_load
from pipeline.training.parallel.capacity import largest
from pipeline.training.parallel.hardware import KINDS, Kind, Link
from pipeline.training.parallel.step_time import Part, Step, Table, step_time, table_bytes, traffic

WIDE = Table(rows=100, dim=10, features=1, ids=3.0)  # a bag of 3 ids
TWICE = Table(rows=40, dim=4, features=2, ids=2.0)  # looked up by two features
EXACT = Kind("", {"fp32": 1e6}, 0, 1e6, link=1e5, flops_share=1, bandwidth_share=1, link_share=1, host=0)
SLOW = Link("", 1e4, share=1, latency=0, node_latency=0)


def table_wise(**more: object) -> Step:
    """100 rows on each of four ranks, two of a node; one table is on rank 0, the other on rank 3."""
    parts = [Part(WIDE, "table_wise", 0, 100, 10), Part(TWICE, "table_wise", 3, 40, 4)]
    return replace(Step(4, 2, 4, 100, parts, flops=600, dense=50, pipelined=False), **more)


def rows_of_all(ranks: int) -> list[Part]:
    return [Part(WIDE, "row_wise", rank, 100 // ranks, 10) for rank in range(ranks)]


def test_all_to_alls_of_whole_tables_send_ids_to_their_rank_and_embeddings_back() -> None:
    sent = traffic(table_wise(backward=2, id_bytes=8))
    ids = np.zeros((4, 4))
    ids[1:, 0] = 100 * (4 + 8 * 3)  # a length of 4 bytes and three ids of 8
    ids[:3, 3] = 100 * (4 * 2 + 8 * 2)
    assert (sent["ids"].sent_RR == ids).all()
    forward = np.zeros((4, 4))
    forward[0, 1:] = 100 * 10 * 4
    forward[3, :3] = 100 * 2 * 4 * 4  # an embedding of each feature
    assert (sent["forward"].sent_RR == forward).all()
    assert (sent["backward"].sent_RR == forward.T / 2).all()  # in 16 bits
    assert not sent["tables"].sent_RR.any()
    ring = np.zeros((4, 4))
    ring[[0, 1, 2, 3], [1, 2, 3, 0]] = 2 * 3 / 4 * 50 * 4
    assert (sent["dense"].sent_RR == ring).all()
    assert sent["forward"].between_nodes(2).tolist() == [[8000, 6400], [6400, 8000]]


def test_rows_of_a_table_on_all_ranks_are_reduced_and_scattered() -> None:
    step = Step(4, 2, 4, 100, rows_of_all(4), flops=0, dense=0)
    sent = traffic(step)
    assert set(sent["ids"].sent_RR[0]) == {0, 100 * 4 * (1 + 3 / 4)}
    sums = 4 * 100 * 10 * 4  # of the rows of all ranks
    for way in ("forward", "backward"):
        assert sent[way].sent_RR.sum() == 4 * 3 / 4 * sums
        assert sent[way].sent_RR[3, 0] == 3 / 4 * sums
    assert traffic(replace(step, gloo=True))["forward"].sent_RR[3, 0] == 2 * 3 / 4 * sums


def test_rows_on_one_node_are_reduced_there_before_they_leave_it() -> None:
    parts = [Part(WIDE, "table_row_wise", rank, 50, 10) for rank in (2, 3)]
    sent = traffic(Step(4, 2, 4, 100, parts, flops=0, dense=0))["forward"]
    output = 100 * 10 * 4
    wanted = np.zeros((4, 4))
    wanted[2, 3] = wanted[3, 2] = 4 * output / 2  # half of the sums of all four ranks' rows
    wanted[2, 0] = wanted[3, 1] = output
    assert (sent.sent_RR == wanted).all()


def test_items_of_a_sequence_are_sent_one_by_one_whatever_the_placement() -> None:
    items = replace(WIDE, pooled=False)
    whole = Step(2, 1, 2, 100, [Part(items, "table_wise", 0, 100, 10)], flops=0, dense=0)
    assert traffic(whole)["forward"].sent_RR.tolist() == [[0, 100 * 3 * 10 * 4], [0, 0]]
    halves = replace(whole, parts=[Part(items, "row_wise", rank, 50, 10) for rank in (0, 1)])
    assert traffic(halves)["forward"].sent_RR.tolist() == [[0, 100 * 1.5 * 10 * 4], [100 * 1.5 * 10 * 4, 0]]


def test_copies_of_tables_are_averaged_over_groups_every_so_many_steps_and_their_gradients_each_step() -> None:
    parts = [Part(WIDE, "row_wise", rank, 50, 10) for rank in (0, 1)]
    step = Step(4, 2, 2, 100, parts, flops=0, dense=0, sync_every=5)
    found = traffic(step)
    half = 50 * (10 * 4 + 4) / 5  # weights and a number of momentum per row
    wanted = np.zeros((4, 4))
    wanted[[0, 1, 2, 3], [2, 3, 0, 1]] = half
    assert found["tables"].sent_RR == pytest.approx(wanted)
    assert found["forward"].between_nodes(2).sum() == 0
    copies = [Part(WIDE, "data_parallel", rank, 100, 10) for rank in range(4)]
    found = traffic(replace(step, group=4, parts=copies, sync_every=1))
    assert found["tables"].sent_RR[0, 1] == 2 * 3 / 4 * 100 * 10 * 4
    assert not any(found[way].sent_RR.any() for way in ("ids", "forward", "backward"))


def test_the_time_of_a_step_is_what_its_slowest_link_and_busiest_rank_take() -> None:
    found = step_time(table_wise(), EXACT, SLOW)
    assert found.compute == pytest.approx(100 * 600 / 1e6 + 50 * 28 / 1e6)
    # 1200 ids: four times the row's 40 bytes, and twice 4 of its momentum.
    assert found.tables == pytest.approx(400 * 3 * (4 * 40 + 2 * 4) / 1e6)
    between = {"ids": 3200, "forward": 8000, "backward": 8000, "dense": 300}  # of a node, in its busier direction
    assert found.exchange == pytest.approx(sum(between[way] for way in ("ids", "forward", "backward")) / 1e4)
    assert found.all_reduce == pytest.approx(300 / 1e4)
    assert found.total == pytest.approx(found.compute + found.tables + found.exchange + found.all_reduce)
    one_node = step_time(table_wise(ranks_per_node=4), EXACT, SLOW)
    assert one_node.exchange == pytest.approx((3 * 1600 + 3 * 4000 + 3 * 4000) / 1e5)


def test_what_pipelining_and_the_backward_cover_is_not_waited_for() -> None:
    fast = replace(SLOW, rate=1e6)
    waited, covered = (step_time(table_wise(pipelined=p), replace(EXACT, link=1e9), fast) for p in (False, True))
    assert waited.exchange - covered.exchange == pytest.approx(3200 / 1e6)
    assert covered.hidden == pytest.approx(3200 / 1e6)
    large = replace(table_wise(), dense=100 * 2**20)  # 400 MiB: 16 buckets of 25
    alone = traffic(large)["dense"].seconds(2, EXACT, SLOW)
    assert step_time(large, EXACT, SLOW).all_reduce == pytest.approx(alone - 2 / 3 * 0.06)
    assert step_time(replace(large, flops=1e15), EXACT, SLOW).all_reduce == pytest.approx(alone / 16)
    assert step_time(replace(large, flops=1e15, gloo=True), EXACT, SLOW).all_reduce == pytest.approx(alone)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.floats(1, 100), st.sampled_from(sorted(KINDS)))
def test_more_of_anything_is_never_slower_and_one_rank_talks_to_nobody(
    ranks: int, per_node: int, factor: float, name: str
) -> None:
    step, link = Step(ranks, min(per_node, ranks), ranks, 64, rows_of_all(ranks), 1e6, 10**6), Link.named("10gbit")
    kind = KINDS[name]
    before = step_time(step, kind, link).total
    for better in (
        step_time(step, kind, replace(link, rate=link.rate * factor)),
        step_time(step, replace(kind, link=kind.link * factor), link),
        step_time(step, replace(kind, memory_bandwidth=kind.memory_bandwidth * factor), link),
        step_time(step, replace(kind, flops={"fp32": kind.flops["fp32"] * factor}), link),
    ):
        assert better.total <= before * (1 + 1e-12)
    alone = step_time(replace(step, ranks=1, ranks_per_node=1, group=1, parts=rows_of_all(1)), kind, link)
    assert alone.exchange == alone.all_reduce == alone.hidden == 0


def test_a_replicated_table_is_updated_as_a_whole_on_each_rank() -> None:
    step = Step(2, 2, 2, 10, [Part(WIDE, "data_parallel", rank, 100, 10) for rank in (0, 1)], flops=0, dense=0)
    assert table_bytes(step) == 10 * 3 * 3 * 40 + 100 * (4 * 40 + 2 * 4)


def test_flops_of_a_row_are_counted_forward_and_backward_three_times_the_forward() -> None:
    bounded = SCHEMA | {"categorical": {n: {"dim": 8, "hash": 9} for n in ("user", "device")}, "bag": {}, "tables": {}}
    schema = Schema.parse(bounded, "small.yaml")
    config = ModelConfig(fusion={"name": "shared_bottom", "widths": [64, 32]}, tower=[16])
    found = row_load.flops_per_row(schema, largest(schema), config)
    inputs = 8 + 8 + 3  # two embeddings; age, whether it is missing, price
    layers = [(inputs, 64), (64, 32), *[(32, 16), (16, 1)] * 3]
    forward = sum(2 * a * b for a, b in layers)
    assert found == 3 * forward  # a product's gradients are two products; embeddings need theirs too


@pytest.mark.parametrize("name", ["fast", "10", "0gbit", "10gbit/s"])
def test_a_link_without_a_rate_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match="expected the rate of a node's network"):
        Link.named(name)
