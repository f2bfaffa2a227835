"""EMM beside the models that it is fused from, and without its parts: the form of the paper's Tables I and II.

    python tests/benchmarks/emm_tables.py [--folder runs/emm-tables] [--seeds 1] [--published]

On Census-Income (T1 income, T2 never_married, as in the paper) and on the demo's log (T1 conversion, T2 click, as the paper's
Ali-CCP). TM-1 and TM-2 are one model a task of the paper's widths (a component three times, then a tower), SB a shared bottom
of TM-1's. Table I: gains are differences to the mean AUC of TM-1 and TM-2; bold and italic are the best and the second best of
the multi-task models. Table II: EMM without trained weights (all of it is trained, from the start), without the merge, without
either (the baseline, which gains are differences to), and whole. AUC is that of the test split after the last epoch, the mean
over seeds. The paper does not say how much its AUC vary; run more than one seed before a difference is believed.

--published: tables and towers of the trained models are left behind and Q, K and V are matrices, as in the authors' code.
Runs stay in the folder, and a second call resumes them. AUC by model, seed and task go to results/emm-tables.json.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from tabulate import tabulate
from train_runs import RESULTS, machine, run

from pipeline.overrides import setting
from pipeline.run.run import Run
from pipeline.storage.files import read_lines

Records = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # dataset -> model -> seed -> AUC of T1 and T2
SOURCES, BASELINE = ("TM-1", "TM-2"), "baseline"
ABLATIONS = {
    BASELINE: {"trained": False, "merge": False},
    "baseline+MTM": {"trained": False, "merge": True},
    "baseline+p": {"trained": True, "merge": False},
    "EMM": {"trained": True, "merge": True},
}
PUBLISHED = {"tables": "new", "towers": "new", "projection": "linear"}


class Log(NamedTuple):
    """A dataset of the tables. tasks: T1, T2. widths: of the component that TM-1 and TM-2 are made of three times."""

    tasks: tuple[str, str]
    widths: dict[str, list[int]]
    tower: list[int]
    settings: list[str]


LOGS = {  # Census: the paper's 100 epochs in 25, by a larger rate of the dense part that decays
    "census": Log(
        ("income", "never_married"),
        {"TM-1": [8, 8], "TM-2": [16, 8]},
        [8],
        [
            "recipe=emm_census_sources",
            "train.epochs=25",
            "train.tables.lr=0.01",
            "train.dense.lr=0.003",
            "train.dense.decay=cosine",
        ],
    ),
    "demo": Log(("conversion", "click"), {"TM-1": [128, 64], "TM-2": [256, 64]}, [32], ["recipe=demo"]),
}


def comparison(records: Records) -> str:
    """Table I."""
    reference = {log: [mean(values) for values in zip(*(_means(found[m]) for m in SOURCES), strict=True)]
                 for log, found in records.items()}  # fmt: skip
    return _table(records, [*SOURCES, "SB", "EMM"], reference, SOURCES)


def ablation(records: Records) -> str:
    """Table II."""
    return _table(
        records, list(ABLATIONS), {log: _means(found[BASELINE]) for log, found in records.items()}, [BASELINE]
    )


def _means(auc_S2: Sequence[Sequence[float]]) -> list[float]:
    """Over seeds, of each task."""
    return [mean(values) for values in zip(*auc_S2, strict=True)]


def _table(
    records: Records, models: Sequence[str], reference: Mapping[str, Sequence[float]], without_gain: Sequence[str]
) -> str:
    """Markdown: a row a model, and for each dataset both AUC and both gains, none for those that gains are taken from.

    The best and second-best AUC are marked; in Table I, where these are two models, among the others.
    """
    ranked = [model for model in models if model not in without_gain or len(without_gain) == 1]
    rows = [[model] for model in models]
    for log, found in records.items():
        auc = {model: _means(found[model]) for model in models}
        for task in (0, 1):
            order = sorted(ranked, key=lambda model, task=task: -auc[model][task])
            marks = dict(zip(order, ("**", "_"), strict=False))
            for row in rows:
                mark = marks.get(row[0], "")
                row.append(f"{mark}{auc[row[0]][task]:.5f}{mark}")
        for row in rows:
            gains = [auc[row[0]][task] - reference[log][task] for task in (0, 1)]
            row += ["-"] * 2 if row[0] in without_gain else [f"{gain:+.5f}" for gain in gains]
    kinds = ("T1-AUC", "T2-AUC", "T1 gain", "T2 gain")
    header = ["Model", *(f"{log} {kind}" for log in records for kind in kinds)]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def datasets(folder: Path) -> None:
    """Preprocesses both logs."""
    if not (folder / "census" / "manifest.json").exists():
        run(["-m", "jobs.preprocess", "data=census", setting("out", folder / "census")])
    if not (folder / "demo" / "manifest.json").exists():
        run(["-m", "jobs.generate", setting("out", folder / "raw"), "impressions=200000"])
        run(["-m", "jobs.preprocess", "data=demo", setting("input", folder / "raw"), setting("out", folder / "demo")])


def trained(folder: Path, log: str, name: str, seed: int, tasks: Sequence[str], *settings: str) -> dict[str, float]:
    """Trains a run and evaluates its last checkpoint: AUC on the test split by task."""
    path = folder / f"{log}-{name}-{seed}"
    fixed = [setting("dataset", folder / log), setting("run", path), f"train.seed={seed}", "train.threads=1"]
    chosen = f"tasks=[{','.join(tasks)}]"
    run(["-m", "jobs.train", *fixed, chosen, *LOGS[log].settings, *settings])
    run(["-m", "jobs.evaluate", setting("run", path), "split=test", "step=newest", "threads=1"])
    metrics = list(read_lines(Run(path).eval_metrics))[-1]["metrics"]
    return {task: metrics[task]["auc"] for task in tasks}


def single(folder: Path, log: str, kind: str, task: str, seed: int) -> float:
    """AUC of a trained model of one task."""
    widths = f"model.fusion.widths={LOGS[log].widths[kind] * 3}"
    tower = f"model.tower={LOGS[log].tower}"
    return trained(folder, log, f"{kind}-{task}", seed, [task], "model=single_task", widths, tower)[task]


def joint(folder: Path, log: str, model: str, seed: int, published: bool) -> list[float]:
    """AUC of both tasks of a multi-task model, EMM and its ablations from the runs of `single`."""
    tasks, tower = LOGS[log].tasks, f"model.tower={LOGS[log].tower}"
    if model == "SB":
        settings = ["model=shared_bottom", f"model.fusion.widths={LOGS[log].widths['TM-1'] * 3}", tower]
    else:
        sources = ",".join(str(folder / f"{log}-{kind}-{task}-{seed}") for task in tasks for kind in SOURCES)
        chosen = ABLATIONS[model] | (PUBLISHED if published else {})
        options = (f"model.fusion.{key}={str(value).lower()}" for key, value in chosen.items())
        settings = ["model=emm", f"model.from=[{sources}]", tower, *options]
    name = model.replace("+", "-") + ("-published" if published and model != "SB" else "")
    return list(trained(folder, log, name, seed, tasks, *settings).values())


def measured(folder: Path, seeds: int, published: bool) -> Records:
    """Trains and evaluates everything, two runs at a time."""
    found: dict[str, dict[str, list[list[float]]]] = {log: {} for log in LOGS}
    with ThreadPoolExecutor(2) as pool:
        singles = {
            (log, kind, task, seed): pool.submit(single, folder, log, kind, task, seed)
            for log in LOGS for kind in SOURCES for task in LOGS[log].tasks for seed in range(seeds)
        }  # fmt: skip
        auc = {key: future.result() for key, future in singles.items()}
        joints = {
            (log, model, seed): pool.submit(joint, folder, log, model, seed, published)
            for log in LOGS for model in ("SB", *ABLATIONS) for seed in range(seeds)
        }  # fmt: skip
        for log in LOGS:
            for kind in SOURCES:
                found[log][kind] = [[auc[log, kind, task, s] for task in LOGS[log].tasks] for s in range(seeds)]
            for model in ("SB", *ABLATIONS):
                found[log][model] = [joints[log, model, s].result() for s in range(seeds)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/emm-tables"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--published", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    datasets(folder)
    records = measured(folder, arguments.seeds, arguments.published)
    name = "emm-tables-published.json" if arguments.published else "emm-tables.json"
    (RESULTS / name).write_text(json.dumps({"machine": machine(), "auc": records}, indent=1) + "\n")
    tables: list[tuple[str, Callable[[Records], str]]] = [("I", comparison), ("II", ablation)]
    for number, table in tables:
        print(f"\nTable {number}\n\n{table(records)}")


if __name__ == "__main__":
    main()
