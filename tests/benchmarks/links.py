"""Which placement for which network: training on two hosts over limited links, beside what jobs.plan goes by.

    python tests/benchmarks/links.py

Two hosts (network namespaces) of one rank each train the same model with each placement over each link. Predicted are the bytes
that a host sends in a step, and the step's time: that of the same two ranks on one host, so compute and tables as they are,
plus the bytes over the link's rate (pipeline.training.parallel.step_time), so that the ratio of predicted to measured tests
the model of the links alone. Bytes are those of the hosts' own counters, times the better of two rounds' means over the steps.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "training")]

import wire  # noqa: E402
from hosts import Host, hosts  # noqa: E402
from train_runs import RESULTS, machine  # noqa: E402

from pipeline.training.parallel.hardware import Kind, Link  # noqa: E402
from pipeline.training.parallel.step_time import traffic  # noqa: E402

ROWS, STEPS, WARM = 120_000, 12, 4  # of the 8 steps that count, one averages tables where one of 8 does
ROUNDS = 2
BATCHES = (1024, 8192)  # of both ranks
LINKS: dict[str, str | None] = {"unlimited": None, "1 Gbit/s": "1000mbit", "100 Mbit/s": "100mbit"}
CASES: dict[str, dict[str, Any]] = {
    "table_wise": {"sharding": {"default": ["table_wise"]}},
    "row_wise": {"sharding": {"default": ["row_wise"]}},
    "row_wise, 16 bits": {
        "sharding": {"default": ["row_wise"]},
        "communication": {"forward": "bf16", "backward": "bf16"},
    },
    "data_parallel": {"sharding": {"default": ["data_parallel"]}},
    "sharding_group=1": {"sharding_group": 1},
    "and sync_every=8": {"sharding_group": 1, "sync_every": 8},
}
SAME_RESULT = (
    "table_wise",
    "row_wise",
    "data_parallel",
)  # weights; 16 bits round, and replicas take steps of their own
BURST = 256 * 1024  # bytes that a limited host may send at once after it was silent (tests/hosts.py)
# Compute and tables come from the run on one host; memory of a machine is no link that is measured here.
NOTHING = Kind("", {"fp32": 1e18}, 0, 1e18, link=1e18, host=0)
COLUMNS = ["batch", "link", "placement", "kB sent", "predicted", "ratio", "step ms", "predicted", "ratio"]


def main() -> None:
    """Runs everything, prints the tables and writes results/links.json."""
    found: list[dict[str, Any]] = []
    cases = {f"{name}@{batch}": case | {"batch_size": batch} for batch in BATCHES for name, case in CASES.items()}
    with tempfile.TemporaryDirectory() as folder, hosts("ha", "hb") as both:
        data = wire.dataset(Path(folder, "data"), ROWS)
        alone = measured(data, both[:1], cases)
        for link, rate in LINKS.items():
            for host in both if rate else []:
                host.limit(rate)
            for case, (seen, seconds) in measured(data, both, cases).items():
                found.append(compared(data, case, cases[case], link, rate, seen, seconds, alone[case][1]))
    print(tabulate([list(row.values()) for row in found], COLUMNS, floatfmt=".2f"))
    print(
        tabulate(fastest(found), ["batch", "link", "fastest, same result", "predicted", "fastest of all", "predicted"])
    )
    content = {"machine": machine(), "steps": STEPS - WARM, "rows": found}
    (RESULTS / "links.json").write_text(json.dumps(content, indent=1) + "\n")


def measured(data: Path, on: list[Host], cases: dict[str, dict[str, Any]]) -> dict[str, tuple[wire.Measured, float]]:
    """Each case on two ranks, on one host or two: what was sent, and the seconds of a step."""
    rounds = {f"{name}@{number}": case for number in range(ROUNDS) for name, case in cases.items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(data)
        seen = wire.train(Path(folder), on, 2 // len(on), rounds, STEPS, WARM)
    print(f"{len(on)} hosts, {len(rounds)} runs", file=sys.stderr, flush=True)
    seconds = {name: statistics.fmean(found.seconds) for name, found in seen.items()}
    return {n: (seen[f"{n}@0"], min(seconds[f"{n}@{number}"] for number in range(ROUNDS))) for n in cases}


def compared(
    data: Path,
    case: str,
    settings: dict[str, Any],
    link: str,
    rate: str | None,
    seen: wire.Measured,
    seconds: float,
    alone: float,
) -> dict[str, Any]:
    """A line of the table. seconds: of a step. alone: of one on one host."""
    name, batch = case.split("@")
    sent = traffic(wire.predicted(data, settings, 2, 1))
    size, counted = float(sum(part.between_nodes(1)[0] for part in sent.values()).max()), max(seen.sent)
    row: dict[str, Any] = {"batch": int(batch), "link": link, "placement": name}
    row |= {"sent_kb": counted / 1e3, "predicted_kb": size / 1e3, "bytes_ratio": size / counted}
    row |= {"step_ms": seconds * 1e3, "predicted_ms": None, "time_ratio": None}
    if rate:
        network = Link("", float(rate.removesuffix("mbit")) * 1e6 / 8, share=1, latency=0, node_latency=0)
        on_link = sum(part.seconds(1, NOTHING, network) for part in sent.values())
        predicted = alone + max(0.0, on_link - min(BURST / network.rate, alone))
        row |= {"predicted_ms": predicted * 1e3, "time_ratio": predicted / seconds}
    return row


def fastest(found: list[dict[str, Any]]) -> list[list[Any]]:
    """For each batch and limited link the placements of the shortest step, measured and predicted; then those of all."""
    lines = []
    for batch in BATCHES:
        for link in [link for link, rate in LINKS.items() if rate]:
            rows = [row for row in found if (row["batch"], row["link"]) == (batch, link)]
            exact = [row for row in rows if row["placement"] in SAME_RESULT]
            by = [(some, key) for some in (exact, rows) for key in ("step_ms", "predicted_ms")]
            lines.append([batch, link, *(min(some, key=lambda r, k=key: r[k])["placement"] for some, key in by)])
    return lines


if __name__ == "__main__":
    main()
