"""The bytes of a step that jobs.plan answers with, against the counters of the links of two hosts with two ranks each."""

from pathlib import Path
from typing import Any

import pytest
import wire
from hosts import hosts, require_hosts

from pipeline.training.parallel.step_time import traffic

pytestmark = pytest.mark.system
RANKS_PER_HOST = 2
ADAGRAD = {"name": "adagrad"}
CASES: dict[str, dict[str, Any]] = {
    "table_wise": {"sharding": {"default": ["table_wise"]}},
    "row_wise": {"sharding": {"default": ["row_wise"]}},
    "row_wise-16-bit": {
        "sharding": {"default": ["row_wise"]},
        "communication": {"forward": "fp16", "backward": "bf16"},
    },
    "column_wise": {"sharding": {"default": ["column_wise"]}, "tables": ADAGRAD},
    "data_parallel": {"sharding": {"default": ["data_parallel"]}},
    "groups-of-one": {"sharding_group": 1},
    "groups-of-a-host": {"sharding_group": 2, "tables": ADAGRAD},
}
BATCH = {"batch_size": 4096}
HEADERS = 0.03  # of the bytes of a step: TCP's, gloo's, and messages that say no more than that a rank is there


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, wire.Measured]]:
    require_hosts()
    folder = tmp_path_factory.mktemp("wire")
    wire.dataset(folder / "data", 40_000)
    with hosts("ha", "hb") as both:
        cases = {name: BATCH | case for name, case in CASES.items()}
        return folder / "data", wire.train(folder, both, RANKS_PER_HOST, cases, steps=6, warm=2)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_a_step_over_the_link_of_two_hosts_are_the_predicted_ones(
    name: str, measured: tuple[Path, dict[str, wire.Measured]]
) -> None:
    data, found = measured
    sent = traffic(wire.predicted(data, BATCH | CASES[name], 2, RANKS_PER_HOST))
    between = sum(part.between_nodes(RANKS_PER_HOST) for part in sent.values())
    print({kind: part.between_nodes(RANKS_PER_HOST)[0].tolist() for kind, part in sent.items()}, found[name])
    for host in range(2):
        assert between[0][host] == pytest.approx(found[name].sent[host], rel=HEADERS)
        assert between[1][host] == pytest.approx(found[name].received[host], rel=HEADERS)
