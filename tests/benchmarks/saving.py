"""How long training pauses for a checkpoint, written at once or in the background: python tests/benchmarks/saving.py.

One rank trains on the workload of workload.py with tables of about 330 MB (weights and momentum), and saves every so many
steps. Both ways take turns in one process. Prints seconds of the pause for the first checkpoint of a run and for later ones,
and of the steps between, which share cores and disk with what is written meanwhile; keeps them in results/saving.json.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import workload
from tabulate import tabulate
from train_runs import RESULTS, configuration, machine, preprocess, write_raw

from pipeline.training.observer import Observer
from pipeline.training.parallel import process_group
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

BUCKETS = 300_000  # of each of the 16 tables
AT_ONCE, BACKGROUND = "at once", "in the background"


class Pauses(Observer):
    """When each checkpoint begins and when training resumes."""

    def __init__(self) -> None:
        self.pauses: list[tuple[float, float]] = []

    def on_checkpoint(self, trainer: Trainer, step: int, seconds: float) -> None:
        now = time.perf_counter()
        self.pauses.append((now - seconds, now))


def main() -> None:
    """Runs both ways in turn, prints a table, keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints: more than writing one takes")
    parser.add_argument("--saves", type=int, default=4, help="of a run")
    parser.add_argument("--trial", action="store_true", help="is not kept")
    options = parser.parse_args()
    device, rounds = process_group.start(), []
    with tempfile.TemporaryDirectory() as name:
        write_raw(Path(name) / "raw", 40_000)
        hashed = [f"+data.schema.categorical.{column}.hash={BUCKETS}" for column in workload.CATS]
        data = preprocess(Path(name) / "raw", Path(name) / "data", *hashed)
        for number in range(options.rounds):
            runs = {}
            for way in (AT_ONCE, BACKGROUND):
                folder = Path(name) / f"{way}-{number}"
                runs[way] = take(data, folder, way == BACKGROUND, options.every, options.saves, device)
            rounds.append(runs)
    dist.destroy_process_group()
    print(table(rounds, options.every))
    if not options.trial:
        content = {"machine": machine(), "every": options.every, "rounds": rounds}
        (RESULTS / "saving.json").write_text(json.dumps(content, indent=1) + "\n")


def take(data: Path, folder: Path, background: bool, every: int, saves: int, device: torch.device) -> dict[str, float]:
    """Seconds: the first pause, the median of later ones, and of the steps between two checkpoints."""
    steps = every * (saves + 1) - 1  # the last checkpoint is that of the end, for which nobody waits with the next step
    train = {
        "batch_size": workload.BATCH,
        "max_steps": steps,
        "checkpoint_every": every,
        "checkpoint_async": background,
    }
    observer = Pauses()
    trainer = prepare(configuration(data, folder, "bench_mmoe", **train, keep={"last": 1}), None, device, [observer])
    trainer.run_to_end()
    pauses = observer.pauses[:saves]
    size = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    del trainer
    gc.collect()
    seconds = [end - begin for begin, end in pauses]
    between = [begin - end for (_, end), (begin, _) in zip(pauses, pauses[1:], strict=False)]
    return {
        "first_s": seconds[0],
        "later_s": statistics.median(seconds[1:]),
        "between_s": statistics.median(between),
        "bytes": size,
    }


def table(rounds: list[dict[str, dict[str, float]]], every: int) -> str:
    """Medians over the rounds, ratios within them."""

    def median(way: str, key: str) -> float:
        return statistics.median(r[way][key] for r in rounds)

    def ratio(way: str, key: str) -> float:
        return statistics.median(r[way][key] / r[AT_ONCE][key] for r in rounds)

    lines = [
        [way, median(way, "first_s"), ratio(way, "first_s"), median(way, "later_s"), ratio(way, "later_s"),
         median(way, "between_s"), ratio(way, "between_s")]
        for way in (AT_ONCE, BACKGROUND)
    ]  # fmt: skip
    headers = ["written", "first pause (s)", "x", "later pauses (s)", "x", f"{every} steps between (s)", "x"]
    title = f"a checkpoint of {rounds[0][AT_ONCE]['bytes'] / 1e6:,.0f} MB, one rank, medians of {len(rounds)} rounds"
    return f"{title}\n" + tabulate(lines, headers, floatfmt=("", ".3f", ".2f", ".3f", ".2f", ".2f", ".2f"))


if __name__ == "__main__":
    main()
