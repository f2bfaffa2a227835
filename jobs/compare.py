"""jobs.compare: architectures side by side on one data set, over several seeds: mean and deviation of AUC and NE per task.

Each run keeps a checkpoint an epoch; the one reported is where early stopping on the validation split would have ended.

Examples:
  python -m jobs.compare
  python -m jobs.compare models='[adatt,adatt_sp]' seeds=5
  python -m jobs.compare data_name=demo recipe=demo folder=runs/compare models='[mmoe,ple,adatt]' seeds=2
"""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tabulate import tabulate

from features.errors import UserError
from jobs.entry import job
from pipeline.dataset import write_json
from pipeline.run import Run, read_lines


@job("compare")
def main(config: DictConfig) -> None:
    """Preprocesses once, trains and evaluates every model and seed, prints the table."""
    folder, data = Path(config.folder), Path(config.folder) / "data"
    if not (data / "manifest.json").exists():
        _call("jobs.preprocess", f"data={config.data_name}", f"out={data}", log=None)
    pairs = [(model, seed) for model in config.models for seed in range(config.seeds)]
    with ThreadPoolExecutor(config.workers) as pool:
        futures = [pool.submit(_run, config, data, model, seed) for model, seed in pairs]
        results: dict[str, list[dict[str, Any]]] = {model: [] for model in config.models}
        for done, ((model, seed), future) in enumerate(zip(pairs, futures, strict=True), 1):
            results[model].append(future.result())
            print(
                f"{done}/{len(pairs)}  {model} seed {seed}  epoch {results[model][-1]['epoch']}",
                file=sys.stderr,
                flush=True,
            )
    write_json(folder / "compare.json", results)
    print(_table(results))
    print(f"\n{config.seeds} seeds, mean±deviation on the test split; {folder / 'compare.json'} has every run")


def _run(config: DictConfig, data: Path, model: str, seed: int) -> dict[str, Any]:
    """One run from nothing (or where it stopped) to the test metrics of its best checkpoint."""
    path = Path(config.folder) / f"{model}-{seed}"
    path.mkdir(parents=True, exist_ok=True)
    log, made = path / "log.txt", {"recipe": config.recipe, "overrides": list(config.overrides)}
    earlier = path / "made.json"
    if earlier.exists() and json.loads(earlier.read_text()) != made:
        raise UserError(f"{path} was made with another recipe or overrides. Choose another folder=, or remove it.")
    write_json(earlier, made)
    recipe = [f"recipe={config.recipe}"] if config.recipe else []
    _call(
        "jobs.train", f"data={config.data_name}", f"dataset={data}", f"model={model}", *recipe, f"run={path}",
        f"train.seed={seed}", "train.threads=1", *config.overrides, log=log,
    )  # fmt: skip
    for split in ("valid", "test"):
        _call("jobs.evaluate", f"run={path}", f"split={split}", "threads=1", log=log)
    run = Run(path)
    found = sorted(read_lines(run.eval_metrics), key=lambda r: r["step"])
    step, epoch = _stop([r for r in found if r["split"] == "valid"], config.patience)
    metrics = next(r["metrics"] for r in found if r["split"] == "test" and r["step"] == step)
    rates = [r["rows_per_s"] for r in read_lines(run.train_metrics)][1:] or [float("nan")]
    return {"seed": seed, "step": step, "epoch": epoch, "rows_per_s": statistics.median(rates), "metrics": metrics}


def _stop(records: list[dict[str, Any]], patience: int) -> tuple[int, int]:
    """Step and number of the checkpoint that early stopping on the mean AUC keeps (regression: R2 counts)."""
    best, best_value = 0, -float("inf")
    for index, record in enumerate(records):
        value = statistics.mean((m["auc"] if "auc" in m else m["r2"]) or 0.0 for m in record["metrics"].values())
        if value > best_value:
            best, best_value = index, value
        elif index - best >= patience:
            break
    return records[best]["step"], best + 1


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    tasks = next(iter(results.values()))[0]["metrics"]
    figures = [(key, task) for key in ("auc", "ne", "r2") for task, m in tasks.items() if key in m]
    lines = []
    for model, runs in results.items():
        values = [[run["metrics"][task][key] for run in runs] for key, task in figures]
        lines.append([model, *map(_mean, values), f"{statistics.median(r['rows_per_s'] for r in runs):,.0f}"])
    header = ["model", *(f"{key.upper()}\n{task}" for key, task in figures), "rows/s"]
    return tabulate(lines, header, disable_numparse=True)


def _mean(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f}±{deviation:.4f}".replace("0.", ".")


def _call(module: str, *arguments: str, log: Path | None) -> None:
    """Runs a job of this Python, its output to `log`. Raises UserError where it fails."""
    with log.open("ab") if log else nullcontext(sys.stderr) as output:
        code = subprocess.call([sys.executable, "-m", module, *arguments], stdout=output, stderr=output)
    if code:
        raise UserError(f"{module} {' '.join(arguments)} ended with exit code {code}" + (f": see {log}" if log else ""))


if __name__ == "__main__":
    main()
