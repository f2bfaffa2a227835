"""What a step of an architecture search costs: python tests/benchmarks/search_step.py [--rounds=3].

Contenders train on the workload of workload.py, each in a process of its own on one thread, in turn, round by round: the
search with all candidates in a step, in fp32 and in bf16; with one path a step; and models that were drawn from the same space
(the default one: 8 experts of 3 blocks), of which a search finds one. Ratios are of median step time within a round, to the
median of the drawn models. Memory is the peak of a process over what it held before its first step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import workload
from tabulate import tabulate
from train_runs import RESULTS, machine, preprocess, write_raw

from models.automtl.architecture import derive, random_strengths
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.search.config import SearchConfig
from pipeline.search.cost import derived_model
from pipeline.search.search import SearchTrainer
from pipeline.training.config import TrainConfig
from pipeline.training.observer import Observer
from pipeline.training.parallel import process_group
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

DRAWN = 5
WARM_UP, STEPS = 3, 12
SEARCHES: dict[str, dict[str, Any]] = {
    "all candidates, fp32": {},
    "all candidates, bf16": {"precision": "bf16"},
    "one path, fp32": {"paths": "one"},
    "one path, bf16": {"paths": "one", "precision": "bf16"},
}


class Clock(Observer):
    """Seconds of each step, and the memory before the first."""

    def on_start(self, trainer: Trainer) -> None:
        self.seconds: list[float] = []
        self.before, self.last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def main() -> None:
    """Runs all contenders in turn, prints a table, keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trial", action="store_true", help="is not kept")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]))))
        return
    names = [*SEARCHES, *(f"drawn {number}" for number in range(DRAWN))]
    with tempfile.TemporaryDirectory() as folder:
        write_raw(Path(folder) / "raw", 80_000)
        split = [
            "data.schema.split.modulo=10",
            f"data.schema.split.train={[*range(8)]}",
            "+data.schema.split.valid=[8,9]",
        ]
        preprocess(Path(folder) / "raw", Path(folder) / "data", *split)
        rounds = [{name: in_process(name, folder) for name in names} for _ in range(options.rounds)]
    print(table(rounds))
    if not options.trial:
        content = {"machine": machine(), "batch": workload.BATCH, "rounds": rounds}
        (RESULTS / "search_step.json").write_text(json.dumps(content, indent=1) + "\n")


def in_process(name: str, folder: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", name, folder]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, folder: Path) -> dict[str, float]:
    """Median seconds of a step of a contender, and MiB of its peak over what there was before the first step."""
    with tempfile.TemporaryDirectory() as run:
        clock, device = Clock(), process_group.start()
        config, kind = configuration(name, folder / "data", Path(run) / "run")
        trainer = prepare(config, None, device, [clock], kind)
        trainer.run_to_end()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - clock.before
    return {"seconds": statistics.median(clock.seconds[WARM_UP:]), "mib": peak / 1024}


def configuration(name: str, data: Path, run: Path) -> tuple[TrainConfig, type[Trainer]]:
    """Of a search, or of the training of a drawn model."""
    own = dict(SEARCHES.get(name, {}))
    train = {
        "batch_size": workload.BATCH, "max_steps": WARM_UP + STEPS, "log_every": 1000, "threads": 1,
        "precision": own.pop("precision", "fp32"), "dense": {"lr": 1e-3},
    }  # fmt: skip
    content = {"dataset": data, "run": run, "model": {"fusion": {"name": "automtl"}, "tower": [64]}, "train": train}
    search = SearchConfig.model_validate(content | {"search": own | {"patience": None}})
    if name in SEARCHES:
        return search, SearchTrainer
    space = search.space.named(list(Dataset(data).schema.tasks))
    strengths = random_strengths(space, search.space.experts, search.space.depth, int(name.split()[1]))
    model = derived_model(ModelConfig.model_validate(content["model"]), derive(strengths, space))
    return TrainConfig.model_validate(content | {"model": model.model_dump(by_alias=True)}), Trainer


def table(rounds: list[dict[str, Any]]) -> str:
    """Medians over rounds of step time, of its ratio to the drawn models' median, and of memory and its ratio."""
    drawn = [name for name in rounds[0] if name not in SEARCHES]
    lines = []
    for name in rounds[0]:
        ratios = {
            key: [found[name][key] / statistics.median(found[d][key] for d in drawn) for found in rounds]
            for key in ("seconds", "mib")
        }
        lines.append(
            [
                name,
                f"{1e3 * statistics.median(found[name]['seconds'] for found in rounds):,.0f}",
                f"{statistics.median(ratios['seconds']):.2f} ({min(ratios['seconds']):.2f}..{max(ratios['seconds']):.2f})",
                f"{statistics.median(found[name]['mib'] for found in rounds):,.0f}",
                f"{statistics.median(ratios['mib']):.2f}",
            ]
        )
    return tabulate(lines, ["contender", "ms a step", "over a drawn model", "MiB", "over"], tablefmt="github")


if __name__ == "__main__":
    main()
