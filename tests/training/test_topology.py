"""The figures that plans go by: kinds of GPUs by their names, bandwidths of collectives, activations of a row."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_training import SCHEMA
from torchrec.distributed.planner.types import CollectiveType

from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.training.parallel import plan, row_load
from pipeline.training.parallel.capacity import largest
from pipeline.training.parallel.hardware import KINDS, Link, recognised
from pipeline.training.parallel.memory import TrainingBytes
from pipeline.training.parallel.topology import Bandwidths, Cluster, topology

GB = 10**9
NODES = Bandwidths(KINDS["h100"], Link.named("400gbit"), ranks_per_node=8)


@pytest.mark.parametrize(
    ("name", "memory", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 85 * GB, "h100"),
        ("NVIDIA H200", 150 * GB, "h200"),
        ("NVIDIA B200", 191 * GB, "b200"),
        ("NVIDIA A100-SXM4-80GB", 85 * GB, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 42 * GB, "a100-40gb"),
        ("NVIDIA L4", 24 * GB, "l4"),
        ("Tesla T4", 16 * GB, "t4"),
        ("NVIDIA L40S", 48 * GB, None),
        ("NVIDIA GH200 480GB", 100 * GB, None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_memory(name: str, memory: int, kind: str | None) -> None:
    assert recognised(name, memory) == (kind and KINDS[kind])


@pytest.mark.parametrize(("name", "kind"), [("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA Unheard 5000", "h100")])
def test_ranks_are_planned_for_by_their_gpus_figures_or_by_stated_ones(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=42 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    caplog.set_level(logging.INFO)
    found = plan.current_cluster(torch.device("cuda", 0))
    assert (found.ranks, found.ranks_per_node, found.hbm, found.kind) == (16, 8, 42 * GB, KINDS[kind])
    said = [f"no figures of {name}: tables are placed by those of H100 SXM 80 GB"]
    assert caplog.messages == ([] if kind == "a100-40gb" else said)


def test_a_ring_crosses_a_nodes_network_once_and_the_ranks_of_a_node_share_it_in_an_all_to_all() -> None:
    rings = (CollectiveType.REDUCE_SCATTER, CollectiveType.ALL_GATHER, CollectiveType.ALL_REDUCE)
    network = 0.8 * 50 * GB / 1000  # bytes per millisecond
    for kind in (*rings, CollectiveType.ALL_TO_ALL):
        assert NODES.get_bw(8, 8, kind) == pytest.approx(0.8 * 450 * GB / 1000)
    for kind in rings:
        assert NODES.get_bw(8, 64, kind) == pytest.approx(network)
    assert NODES.get_bw(8, 64, CollectiveType.ALL_TO_ALL) == pytest.approx(network / 8)
    # What table_row_wise sends between nodes: a rank of each, and all ranks of a node at once.
    assert NODES.get_bw(1, 8, CollectiveType.ALL_TO_ALL) == pytest.approx(network / 8)


def test_the_planner_is_given_the_figures_of_the_kind_and_the_link() -> None:
    cluster = Cluster(16, 8, "cuda", 141 * GB, 10**12, KINDS["h200"], Link.named("400gbit"))
    found = topology(cluster, cluster.available(TrainingBytes(GB), 2 * GB), 16, 8)
    assert found.hbm_mem_bw == pytest.approx(0.5 * 4800 * GB / 1000)
    assert found.hbm_to_ddr_mem_bw == pytest.approx(0.8 * 64 * GB / 1000)
    assert found.intra_host_bw == pytest.approx(0.8 * 450 * GB / 1000)
    assert found.inter_host_bw == pytest.approx(0.8 * 50 * GB / 1000 / 8)
    assert [device.storage.hbm for device in found.devices] == pytest.approx([0.95 * 141 * GB - 3 * GB] * 16)
    pair = Cluster(2, 2, "cpu", 0, 10 * GB)
    on_cpu = topology(pair, pair.available(TrainingBytes(GB), 2 * GB, copied=GB), 2, 2)
    assert on_cpu.ddr_mem_bw == pytest.approx(0.5 * KINDS["cpu-core"].memory_bandwidth / 1000)
    assert {device.storage.ddr for device in on_cpu.devices} == {6 * GB}


def test_activations_of_a_row_are_what_autograd_saves_of_it_whatever_the_size_of_the_weights() -> None:
    bounded = SCHEMA | {"categorical": {n: {"dim": 8, "hash": 9} for n in ("user", "device")}, "bag": {}, "tables": {}}
    schema = Schema.parse(bounded, "small.yaml")
    config = ModelConfig(fusion={"name": "shared_bottom", "widths": [64, 32]}, tower=[16])
    found = row_load.activation_bytes(schema, largest(schema), config, bf16=False)
    inputs = 8 + 8 + 3  # two embeddings; age, whether it is missing, price
    least = 4 * (inputs + 64 + 32 + 3 * 16)  # the inputs of all products
    assert least <= found <= 2.5 * least  # and what activation functions and look-ups keep
    wide = ModelConfig(fusion={"name": "shared_bottom", "widths": [6400, 32]}, tower=[16])
    more = row_load.activation_bytes(schema, largest(schema), wide, bf16=True)
    assert 6336 < more - found < 4 * 6336  # of the widest layer, most in 16 bits
