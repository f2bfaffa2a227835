"""jobs.demo: the whole pipeline on a generated log: generate, preprocess, train on 2 ranks while an evaluator follows.

Examples:
  python -m jobs.demo
  python -m jobs.demo model=ple
  python -m jobs.demo model=mmoe folder=s3://bucket/demo impressions=1200000
"""

import os
import shlex
import subprocess
import sys
import time

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from features.errors import UserError
from jobs.entry import job
from pipeline.overrides import setting
from pipeline.storage.files import remove_tree
from pipeline.storage.store_path import place

ENVIRONMENT = {**os.environ, "TASKFUSE_LINES": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


@job("demo")
def main(config: DictConfig) -> None:
    """Prints and runs each command as a person would, then lists the outputs."""
    begin = time.monotonic()
    try:
        folder = place(config.folder)
    except ValueError as error:
        raise UserError(f"folder: {error}") from None
    model = HydraConfig.get().runtime.choices["model"]
    raw, data, run = folder / "raw", folder / "data", folder / model
    print("taskfuse demo: a raw event log in, per-task Normalized Entropy out. Each command can be run by itself.\n")
    if (run / "config.yaml").exists():
        remove_tree(run)
    _finish(_start("jobs.generate", setting("out", raw), f"impressions={config.impressions}"))
    _finish(_start("jobs.preprocess", "data=demo", setting("input", raw), setting("out", data), "overwrite=true"))
    evaluator = _start(  # the ranks may take every core
        "jobs.evaluate", "data=demo", setting("data.input", raw), setting("run", run), "follow=true", "idle=false"
    )
    trainer = _start(
        "jobs.train",
        setting("dataset", data),
        f"model={model}",
        "recipe=demo",
        setting("run", run),
        launcher=("jobs.launch", f"--nproc-per-node={config.ranks}"),
    )
    try:
        _finish(trainer)
        _finish(evaluator)
    finally:
        evaluator.terminate()
    print(
        f"""
Done in {time.monotonic() - begin:.0f} s. "gap closed" is the share of the way from NE 1, which the base rate has,
to the best possible NE, which the true probabilities of the generated events have.

  {raw!s:18}  the log: a CSV file of impressions, clicks and conversions a day, and truth.parquet
  {data!s:18}  the dataset: Parquet shards, manifest.json, schema.yaml, encoders/
  {run!s:18}  the run: checkpoints/, metrics/*.jsonl, evaluations/ (every slice), tensorboard/, report.html

Next:
  another architecture   make demo MODEL=ple          (or mmoe, adatt_sp, shared_bottom)
  another setting        .venv/bin/python -m jobs.train dataset={data} recipe=demo run={folder}/bf16 train.precision=bf16
  real data              make census                  (the UCI census file, see its data config)
  your own logs          README.md, "Your own data"
"""
    )


def _start(module: str, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Prints a command and starts it with this Python. launcher: the module and flags that start it on several ranks."""
    words = ["-m", *launcher, "-m", module, *arguments] if launcher else ["-m", module, *arguments]
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    return subprocess.Popen([sys.executable, *words], env=ENVIRONMENT)


def _finish(process: subprocess.Popen) -> None:
    """Waits for a command. Raises UserError where it fails."""
    if code := process.wait():
        raise UserError(f"the demo stops: a command ended with exit code {code}; its output is above")


if __name__ == "__main__":
    main()
