"""What each rank does for wire.py: python -m jobs.launch ... wire_ranks.py FOLDER

FOLDER holds the dataset `data` and cases.json (wire.train). Of each case FOLDER/NAME.RANK.json gets the bytes per step that
this host sent over eth0 and received, and the seconds of each step.
"""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_training import on_each_rank

from models.ranker import ModelConfig
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

COUNTERS = Path("/sys/class/net/eth0/statistics")  # of this process's network namespace


def sent_and_received() -> tuple[int, int]:
    """Bytes over this host's link so far."""
    if not COUNTERS.exists():
        return 0, 0
    return int((COUNTERS / "tx_bytes").read_text()), int((COUNTERS / "rx_bytes").read_text())


class Watch(Observer):
    """Reads the clock after each step, and the counters after `warm` steps and at the end, where no rank sends."""

    def __init__(self, warm: int, last: int) -> None:
        self.warm, self.last = warm, last
        self.seconds: list[float] = []
        self.counted: list[tuple[int, int]] = []

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        step = trainer.state.step
        if step in (self.warm, self.last):
            dist.barrier()
            self.counted.append(sent_and_received())
            dist.barrier()
        if step >= self.warm:
            self.seconds.append(time.perf_counter())


def main(folder: Path) -> None:
    given = json.loads((folder / "cases.json").read_text())
    warm, last = given["warm"], given["steps"]
    for name, settings in given["cases"].items():
        train = Settings(**(settings | {"max_steps": last}))
        model = ModelConfig.model_validate(given["model"])
        config = TrainConfig(dataset=folder / "data", run=folder / name, model=model, train=train)
        watch = Watch(warm, last)
        prepare(config, None, torch.device("cpu"), [watch]).run_to_end()
        counted = [(after - before) / (last - warm) for before, after in zip(*watch.counted, strict=True)]
        seconds = [b - a for a, b in zip(watch.seconds, watch.seconds[1:], strict=False)]
        found = {"sent": counted[0], "received": counted[1], "seconds": seconds}
        (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    on_each_rank(main)
