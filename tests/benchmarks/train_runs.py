"""What training benchmarks share: datasets of the workload, processes over them, settings of a trainer, the machine."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import torch
import workload
import yaml

from models.ranker import ModelConfig
from pipeline.training.config import Settings, TrainConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONF = f"--config-dir={HERE / 'conf'}"


def write_raw(folder: Path, rows: int = workload.ROWS, files: int = 4) -> None:
    """The workload's rows as CSV files."""
    folder.mkdir(parents=True)
    table = pa.table(workload.rows(count=rows))
    size = -(-rows // files)
    for part in range(files):
        pa.csv.write_csv(table.slice(part * size, size), folder / f"rows-{part}.csv")


def preprocess(raw: Path, out: Path, *more: str) -> Path:
    """A dataset of them."""
    run(["-m", "jobs.preprocess", CONF, "data=workload", f"input={raw}", f"out={out}", *more])
    return out


def run(arguments: list[str], ranks: int = 1, path: str = "") -> str:
    """Runs `python ARGUMENTS` to its end, under torchrun on several ranks, a thread each; returns what it printed.

    Args:
        path: PYTHONPATH.
    Raises:
        SystemExit: with its last lines, if it fails.
    """
    done = subprocess.run(command(arguments, ranks), env=environment(path), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n" + "\n".join(done.stderr.splitlines()[-12:]))
    return done.stdout


def command(arguments: list[str], ranks: int = 1) -> list[str]:
    """What `run` starts."""
    launcher = ["-m", "jobs.launch", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    # torchrun runs a script or, after -m, a module, just as python does.
    return [sys.executable, *launcher, *arguments]


def environment(path: str = "") -> dict[str, str]:
    """Of a process that computes on one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def configuration(dataset: Path, folder: Path, model: str, **train: object) -> TrainConfig:
    """Of a trainer in this process; model: a file of conf/model, by name."""
    chosen = ModelConfig(**yaml.safe_load((HERE / "conf" / "model" / f"{model}.yaml").read_text()))
    settings = {"lanes": 8, "threads": 1, "epochs": 999, "log_every": 10} | train
    return TrainConfig(dataset=dataset, run=folder, model=chosen, train=Settings(**settings))


def machine() -> dict[str, str | int | None]:
    """What figures depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
