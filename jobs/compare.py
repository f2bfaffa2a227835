"""jobs.compare: architectures side by side on one data set, over several seeds, with boosted trees among them.

Prints and saves per task AUC and NE, the NE difference to a baseline with a paired 95% interval, what each model costs, and the
difference after 1/7 and 3/7 of the training rows. Each run is judged by the checkpoint where early stopping on the validation
split would have ended. What is there is not made again.

Examples:
  python -m jobs.compare
  python -m jobs.compare models='[adatt,adatt_sp]' baseline=adatt_sp seeds=5
  python -m jobs.compare data=demo models='[mmoe,ple,adatt]' seeds=2 'overrides=["train.batch_size=2048"]'
  python -m jobs.compare models='[adatt,wide]' baseline=adatt '+model_overrides={wide: ["model=adatt", "model.tower=[128]"]}'
"""

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from features.errors import UserError
from jobs.entry import job
from pipeline.dataset.dataset import Dataset
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage.files import read_lines, write_json, write_text

SOURCES: defaultdict[int, Lock] = defaultdict(Lock)  # by seed


@job("compare")
def main(config: DictConfig) -> None:
    """Preprocesses once, trains and evaluates every model and seed, prints and saves the tables."""
    from pipeline.search import comparison

    if config.baseline not in config.models:
        raise UserError(f"baseline={config.baseline} is not one of models: {', '.join(config.models)}")
    folder, data = Path(config.folder), Path(config.folder) / "data"
    if not (data / "manifest.json").exists():
        _call("jobs.preprocess", f"data={_chosen()}", *_overrides("data."), f"out={data}", log=None)
    dataset = Dataset(data)
    entries = {name: comparison.Entry(name) for name in config.models}
    pairs = [(name, seed) for name in config.models for seed in range(config.seeds)]
    with ThreadPoolExecutor(config.workers) as pool:
        futures = [pool.submit(_run, config, data, *pair) for pair in pairs]
        try:
            for done, ((name, seed), future) in enumerate(zip(pairs, futures, strict=True), 1):
                found, rows = future.result()
                entries[name].runs.append(found)
                entries[name].rows.append(rows)
                print(f"{done}/{len(pairs)}  {name} seed {seed}  epoch {found['epoch']}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what waits would be begun otherwise, all of it
            raise
    for name, entry in entries.items():
        entry.size = _size(Path(config.folder) / f"{name}-0", dataset)
    if config.trees:
        entries["boosted trees"] = _trees(config, dataset, folder / "trees")
    _report(config, list(entries.values()), entries[config.baseline], dataset)


def _run(config: DictConfig, data: Path, name: str, seed: int) -> tuple[dict[str, Any], Path]:
    """One run from nothing (or where it stopped) to the test metrics and predictions of its best checkpoint."""
    from pipeline.evaluation import predictions
    from pipeline.evaluation.follow import EvaluateConfig, dataset_of
    from pipeline.run import records
    from pipeline.search import comparison

    path, shares = Path(config.folder) / f"{name}-{seed}", f"train.checkpoint_at={list(comparison.SHARES)}"
    own = list(config.model_overrides.get(name, []))
    if not any(text.startswith("model=") for text in own):
        own.insert(0, f"model={name}")
    if "model=emm" in own:
        own.append(f"model.from={_sources(config, data, seed)}")
    _train(config, data, path, seed, [*own, shares])
    run, log, one = Run(path), path / "log.txt", "threads=1"
    rows, there = dataset_of(run, EvaluateConfig(run=path)).name, set(checkpoint.steps(run.checkpoints))
    if there - records.current(run, "valid", rows).keys():
        _call("jobs.evaluate", f"run={path}", "split=valid", one, log=log)
    found = list(records.latest(run, "valid", rows).values())
    train, steps, total = run.config()["train"], [r["step"] for r in found], found[-1]["step"]
    every = train["checkpoint_every"] or max(1, total // train["epochs"])
    step = _stop([r for r in found if r["step"] % every == 0 or r["step"] == total], config.patience)
    early = [min(steps, key=lambda s: abs(s - share * total)) for share in (*comparison.SHARES, 1)]
    wanted = sorted({step, *early})
    stale = there & {*wanted} - records.current(run, "test", rows).keys()
    if stale or not all(predictions.path(run, "test", s).exists() for s in wanted):
        _call("jobs.evaluate", f"run={path}", "split=test", f"step={wanted}", "predictions=true", one, log=log)
    metrics = {s: record["metrics"] for s, record in records.latest(run, "test", rows).items()}
    record = {
        "step": step,
        "epoch": round(step * train["epochs"] / total, 1),
        "rows_per_s": statistics.median([r["rows_per_s"] for r in read_lines(run.train_metrics)][1:] or [float("nan")]),
        "metrics": metrics[step],
        "early": {f"{round(s / total * 7)}/7": metrics[s] for s in early},
    }
    return record, predictions.path(run, "test", step)


def _train(config: DictConfig, data: Path, path: Path, seed: int, own: list[str]) -> None:
    """Trains a run, or goes on with it. Raises UserError for one that was made with other settings."""
    path.mkdir(parents=True, exist_ok=True)
    recipe = [f"recipe={config.recipe_name}"] if config.recipe_name else []
    settings, earlier = [*recipe, *config.overrides, *own], path / "made.json"
    if earlier.exists() and json.loads(earlier.read_text()) != settings:
        raise UserError(f"{path} was made with another recipe or overrides. Choose another folder=, or remove it.")
    write_json(earlier, settings)
    if (status := Run(path).status()) and status.state == "finished":
        return
    fixed = [f"dataset={data}", f"run={path}", f"train.seed={seed}", "train.threads=1"]
    _call("jobs.train", *fixed, *settings, log=path / "log.txt")


def _sources(config: DictConfig, data: Path, seed: int) -> list[str]:
    """Trains what emm is fused from: a run of each kind for each task."""
    paths = []
    with SOURCES[seed]:  # two models may be fused from the same
        for task in Dataset(data).schema.tasks:
            for kind, own in config.emm_sources.items():
                paths.append(Path(config.folder) / f"{kind}-{task}-{seed}")
                _train(config, data, paths[-1], seed, [*own, f"tasks=[{task}]"])
    return [str(path) for path in paths]


def _stop(records: list[dict[str, Any]], patience: int) -> int:
    """Step of the checkpoint that early stopping on the mean AUC keeps (regression: R2 counts)."""
    best, best_value = 0, -float("inf")
    for index, record in enumerate(records):
        value = statistics.mean((m["auc"] if "auc" in m else m["r2"]) or 0.0 for m in record["metrics"].values())
        if value > best_value:
            best, best_value = index, value
        elif index - best >= patience:
            break
    return records[best]["step"]


def _size(path: Path, dataset: Dataset) -> dict[str, Any]:
    from pipeline.evaluation.model_cost import size
    from pipeline.evaluation.scorer import Evaluator

    evaluator = Evaluator(Run(path), dataset, "test", 256)
    return size(evaluator.ranker, next(evaluator.loader.batches(evaluator.loader.start())))


def _trees(config: DictConfig, dataset: Dataset, folder: Path) -> Any:
    """The trees' entry, fitted once and kept."""
    from pipeline.evaluation.trees import boosted_trees
    from pipeline.search.comparison import Entry

    kept, rows = folder / "trees.json", folder / "test.parquet"
    if not kept.exists():
        print("boosted trees, one model a task", file=sys.stderr, flush=True)
        write_json(kept, boosted_trees(dataset, config.trees_max_rows, 0, rows))
    return Entry("boosted trees", [json.loads(kept.read_text())], [rows])


def _report(config: DictConfig, entries: list[Any], baseline: Any, dataset: Dataset) -> None:
    from pipeline.search import comparison

    folder, tasks = Path(config.folder), {name: task.kind for name, task in dataset.schema.tasks.items()}
    write_json(folder / "compare.json", {entry.name: entry.runs for entry in entries})
    comparison.parquet(entries, baseline, tasks, folder / "compare.parquet")
    comparison.picture(entries, baseline, tasks).savefig(folder / "compare.png", dpi=120)
    write_text(folder / "compare.md", comparison.tables(entries, baseline, tasks, "github") + "\n")
    print(comparison.tables(entries, baseline, tasks, "simple"))
    print(
        f"\n{config.seeds} seeds, mean±deviation on the test split; % is the difference to {baseline.name}, ± half its 95%"
    )
    print(f"{folder}/compare.md, compare.png and compare.parquet; a run a folder beside them")


def _chosen() -> str:
    return str(HydraConfig.get().runtime.choices["data"])


def _overrides(prefix: str) -> list[str]:
    """What the command line said below a key, for the job that it concerns."""
    return [text for text in HydraConfig.get().overrides.task if text.lstrip("+~").startswith(prefix)]


def _call(module: str, *arguments: str, log: Path | None) -> None:
    """Runs a job of this Python, its output to `log`. Raises UserError where it fails."""
    groups = [text for text in sys.argv[1:] if text.startswith("--config-dir=")]  # files of the user's own
    with log.open("ab") if log else nullcontext(sys.stderr) as output:
        code = subprocess.call([sys.executable, "-m", module, *groups, *arguments], stdout=output, stderr=output)
    if code:
        raise UserError(f"{module} {' '.join(arguments)} ended with exit code {code}" + (f": see {log}" if log else ""))


if __name__ == "__main__":
    main()
