"""Training throughput of taskfuse beside what it is measured against, in one run: python tests/benchmarks/train.py.

Per round and model each contender is a process of its own, or two under torchrun, on the workload of workload.py with 4,096
rows a rank and step, one thread a rank:

    taskfuse          jobs.train, from a dataset that jobs.preprocess wrote: reads, shards, logs and checkpoints
    plain PyTorch     plain_trainer.py: the same model on the same files, with what torch has (sparse nn.Embedding, DDP)
    fbgemm loop       baselines.py loop: the same on fbgemm's fused tables, rows in memory, one process
    torch-rechub      baselines.py rechub: its own trainer, model of the same sizes, rows in memory, one process, fp32
    floor             floor.py: rows of the tables at the memory's rate, the dense part's products at the rate of the fastest

Ratios are taken within a round, so that a machine that slows down slows both sides; the medians over the rounds are printed
and kept in results/. "x plain" and "of the floor" compare the same ranks and number format, "x rechub" always its one run.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import workload
from tabulate import tabulate
from train_runs import CONF, HERE, RESULTS, machine, preprocess, run, write_raw

RECHUB = HERE.parents[1] / ".venv" / "rechub"
COLUMNS = ["rows/s", "x rechub", "x plain", "of the floor", "x 1 rank", "data wait", "first step (s)"]
FORMATS = ("", ",.0f", ".2f", ".2f", ".0%", ".2f", ".1%", ".1f")
WARMUP = 10  # steps that are not timed
Figures = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """A line of the table; `name` is one of those above."""

    name: str
    ranks: int = 1
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.name}, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.dtype}"


RECHUB_RUN = Contender("torch-rechub")
ONE_PROCESS = [RECHUB_RUN, Contender("fbgemm loop"), Contender("fbgemm loop", dtype="bf16")]
# What is compared most runs close together: a machine may change within a round too.
CONTENDERS = [Contender(name) for name in ("taskfuse", "plain PyTorch", "floor")] + ONE_PROCESS
CONTENDERS += [
    Contender(name, ranks, dtype)
    for ranks, dtype in ((2, "fp32"), (1, "bf16"), (2, "bf16"))
    for name in ("taskfuse", "plain PyTorch", "floor")
]
Round = dict[Contender, Figures]


def main() -> None:
    """Runs the rounds, prints a table for each model, writes results/train-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["mmoe", "ple"], choices=["mmoe", "ple"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=workload.ROWS, help="fewer: a trial, not kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_raw(Path(name) / "raw", options.rows)
        data = preprocess(Path(name) / "raw", Path(name) / "data")
        for model in options.models:
            rounds: list[Round] = []
            for number in range(options.rounds):
                rounds.append({each: take(each, data, model, options.steps) for each in CONTENDERS})
                print(f"{model} round {number + 1}/{options.rounds}", file=sys.stderr, flush=True)
            print(table(model, rounds), flush=True)
            if options.rows == workload.ROWS:
                keep(model, rounds)


def take(contender: Contender, data: Path, model: str, steps: int) -> Figures:
    """One run: rows_per_s, and what else it reports."""
    common = ["--model", model, "--dtype", contender.dtype, "--steps", str(steps)]
    scripts = {
        "plain PyTorch": ["plain_trainer.py", str(data)],
        "fbgemm loop": ["baselines.py", "loop"],
        "torch-rechub": ["baselines.py", "rechub"],
        "floor": ["floor.py"],
    }
    if contender.name == "taskfuse":
        return taskfuse(contender, data, model, steps)
    script, *arguments = scripts[contender.name]
    path = str(RECHUB) if contender == RECHUB_RUN else ""
    printed = run([str(HERE / script), *arguments, *common], contender.ranks, path)
    return json.loads(printed.splitlines()[-1])


def taskfuse(contender: Contender, data: Path, model: str, steps: int) -> Figures:
    """Median rows/s, share of time waiting for data, seconds from the start of the process to the first step."""
    folder = Path(tempfile.mkdtemp(dir=data.parent))
    begin = time.time()
    run(
        ["-m", "jobs.train", CONF, f"dataset={data}", f"run={folder}", f"model=bench_{model}",
         f"train.batch_size={workload.BATCH * contender.ranks}", f"train.precision={contender.dtype}", "train.lanes=8",
         "train.threads=1", f"train.max_steps={steps + WARMUP}", "train.epochs=99", "train.log_every=10"],
        contender.ranks,
    )  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics" / "train.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    steady = [r for r in records if r["step"] > WARMUP]
    return {
        "rows_per_s": statistics.median(r["rows_per_s"] for r in steady),
        "data_wait": statistics.mean(r["data_wait"] for r in steady),
        "first_step_s": records[0]["time"] - begin,
    }


def table(model: str, rounds: list[Round]) -> str:
    """The medians over the rounds, and what the floor is made of."""

    def median(contender: Contender, key: str) -> float | None:
        values = [r[contender][key] for r in rounds if key in r[contender]]
        return statistics.median(values) if values else None

    def ratio(contender: Contender, other: Contender) -> float | None:
        if other not in rounds[0]:
            return None
        return statistics.median(r[contender]["rows_per_s"] / r[other]["rows_per_s"] for r in rounds)

    lines, notes = [], []
    for each in rounds[0]:
        plain, floor = (Contender(name, each.ranks, each.dtype) for name in ("plain PyTorch", "floor"))
        alone = ratio(each, Contender(each.name, 1, each.dtype)) if each.ranks > 1 else None
        ratios = [ratio(each, other) for other in (RECHUB_RUN, plain, floor)]
        lines.append(
            [each, median(each, "rows_per_s"), *ratios, alone, median(each, "data_wait"), median(each, "first_step_s")]
        )
        if each.name == "floor":
            size, tables_s, flops, products_s = (median(each, k) for k in ("bytes", "tables_s", "flops", "products_s"))
            notes.append(
                f"{each}: {size / 1e6:.1f} MB of tables at {size / tables_s / 1e9:.1f} GB/s take {tables_s * 1e3:.1f} ms, "
                f"{flops / 1e9:.1f} GFLOP at {flops / products_s / 1e9:.0f} GFLOP/s take {products_s * 1e3:.1f} ms"
            )
    title = f"\n{model}: one thread a rank, medians of {len(rounds)} rounds"
    body = tabulate(lines, [model, *COLUMNS], floatfmt=FORMATS, missingval="", disable_numparse=[0])
    return "\n".join([title, body, "of 4,096 rows a rank:", *notes])


def keep(model: str, rounds: list[Round]) -> None:
    """Writes the figures of every round."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "rounds": [{str(each): figures for each, figures in r.items()} for r in rounds]}
    (RESULTS / f"train-{model}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
