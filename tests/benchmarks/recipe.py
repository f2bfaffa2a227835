"""Study of training recipes: variants of the settings of jobs.train on several data sets, over seeds.

    python tests/benchmarks/recipe.py prepare --data D
    python tests/benchmarks/recipe.py run --data D --out OUT --variants variants.yaml --seeds 3 --workers 2
    python tests/benchmarks/recipe.py table --out OUT

variants.yaml maps names to lists of overrides; `shipped`, which has none, is always among them:

    decay: [train.dense.decay=linear]
    mmoe: [model=mmoe, model.tower=[64]]

A variant stands on the settings of its data set (`DATASETS` in recipe_run.py) and on --base, such as --base model=mmoe. Each
run has one thread of a worker process; its last checkpoint is scored on the test split, and appended to OUT/results.jsonl.
What is there is not run again while its overrides and its dataset are the same, so a study goes on after a kill; after a
change of the code take another --out. The truth of generated logs is known: gap is `gap_closed` in recipe_run.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import yaml
from recipe_run import DATASETS, truth_of
from tabulate import tabulate

from features.errors import UserError
from jobs.entry import bound_resolvers, user_errors
from pipeline.overrides import setting
from pipeline.run.headline import headline
from pipeline.storage.files import append_line, appending, make_folder, read_lines, sha256

SHIPPED = "shipped"
HERE = Path(__file__).parent

Job = dict[str, Any]  # dataset, data (its identity), variant, overrides, seed; and path, run, truth for a worker
KEY = ("dataset", "data", "variant", "overrides", "seed")


def prepare(data: Path, names: Sequence[str], again: bool) -> None:
    """Writes DATA/NAME/raw and DATA/NAME/data where they are missing; `again` preprocesses anew."""
    for name in names:
        spec, raw, out = DATASETS[name], data / name / "raw", data / name / "data"
        if spec.generate and not (raw / "truth.parquet").exists():
            module, *arguments = spec.generate
            _python("-m", module, setting("out", raw), *arguments)
        if again or not (out / "manifest.json").exists():
            own = [setting("input", raw)] if spec.generate else []
            _python("-m", "jobs.preprocess", f"data={spec.data}", setting("out", out), "overwrite=true", *own)


def _python(*words: str) -> None:
    if subprocess.call([sys.executable, *words]):
        raise UserError(f"python {' '.join(words)} failed: its output is above")


def variants_of(path: Path | None) -> dict[str, list[str]]:
    """The variants of a file, `shipped` first. Raises UserError for a file of another form."""
    found = yaml.safe_load(path.read_text()) if path else {}
    fits = isinstance(found, dict) and all(
        isinstance(own, list) and all(isinstance(word, str) for word in own) for own in found.values()
    )
    if not fits or found.get(SHIPPED):
        raise UserError(f"{path}: write NAME: [OVERRIDE, ...] lines, none of them {SHIPPED}, which has no overrides")
    return {SHIPPED: [], **{str(name): own for name, own in found.items()}}


def jobs_of(
    data: Path, out: Path, names: Sequence[str], variants: Mapping[str, Sequence[str]], base: Sequence[str], seeds: int
) -> list[Job]:
    """The runs of a study: every variant and data set with one seed, then with the next."""
    jobs = []
    sets = {name: (_identity(data / name / "data"), truth_of(name, data)) for name in names}
    for seed in range(seeds):
        for name, (identity, truth) in sets.items():
            for variant, own in variants.items():
                jobs.append(
                    {
                        "dataset": name,
                        "data": identity,
                        "variant": variant,
                        "overrides": [*DATASETS[name].train, *base, *own],
                        "seed": seed,
                        "path": str(data / name / "data"),
                        "run": str(out / "runs" / f"{name}-{variant}-{seed}"),
                        "truth": truth.model_dump(mode="json") if truth else None,
                    }
                )
    return jobs


def _identity(dataset: Path) -> str:
    manifest = dataset / "manifest.json"
    if not manifest.exists():
        raise UserError(f"{dataset} is no dataset: run `recipe.py prepare` first")
    return sha256(manifest)[:12]


def key_of(record: Mapping[str, Any]) -> str:
    """What a result is of, to compare."""
    return json.dumps([record[name] for name in KEY])


class Worker:
    """A process of recipe_run.py, started when it has its first job and again after one that failed."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | None = None

    def run(self, job: Job) -> dict[str, Any]:
        """The worker's answer."""
        if self.process is None or self.process.poll() is not None:
            with appending(self.log) as log:
                command = [sys.executable, str(HERE / "recipe_run.py")]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "the worker died"}')
        if "error" in answer:
            self.process.wait()
        return answer

    def close(self) -> None:
        """Ends the process, and what it may be at work on."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def run(jobs: Sequence[Job], out: Path, workers: int) -> None:
    """Runs those that have no result yet, and appends the results; one that fails is reported, and run again next time."""
    results = make_folder(out) / "results.jsonl"
    done = {key_of(record) for record in read_lines(results)}
    left = [job for job in jobs if key_of(job) not in done]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them done before", flush=True)
    local, started, commit = threading.local(), [], _commit()

    def one(job: Job) -> tuple[Job, dict[str, Any]]:
        if not hasattr(local, "worker"):
            local.worker = Worker(out / f"worker-{threading.get_ident()}.log")
            started.append(local.worker)
        return job, local.worker.run(job)

    begin = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, job) for job in left]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                job, answer = future.result()
                said = answer.get("error") or _summary(answer)
                if "error" not in answer:
                    kept = {name: job[name] for name in KEY}
                    append_line(results, {**kept, **answer, "commit": commit, "time": time.time()})
                minutes = (time.monotonic() - begin) / count * (len(left) - count) / 60
                print(
                    f"{count}/{len(left)}  {job['dataset']} {job['variant']} seed {job['seed']}  {said}  "
                    f"left {minutes:.0f} min",
                    flush=True,
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in started:
                worker.close()


def _summary(answer: Mapping[str, Any]) -> str:
    values = [f"{task} {m[headline(m)]:.4f}" for task, m in answer["metrics"].items() if m.get(headline(m)) is not None]
    return f"{' '.join(values)}  {answer['cpu']:.0f} CPU s"


def _commit() -> str:
    """Of the code that trains; a + where it was changed since."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def table(records: Iterable[Mapping[str, Any]], dataset: str) -> str:
    """A line a variant: per task the headline metric and the gap closed, mean ± deviation over seeds, and the difference
    to `shipped`, taken seed by seed.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["dataset"] == dataset:
            runs.setdefault(record["variant"], {})[record["seed"]] = record
    tasks = next(iter(runs[next(iter(runs))].values()))["metrics"]
    columns = [(task, name) for task, m in tasks.items() for name in (headline(m), "gap") if name in m]
    header = ["variant", "seeds", "CPU s", *(f"{task}\n{name}" for task, name in columns)]
    lines = []
    for variant, by_seed in runs.items():
        line = [variant, str(len(by_seed)), f"{statistics.mean(r['cpu'] for r in by_seed.values()):.0f}"]
        for task, name in columns:
            values = {seed: record["metrics"][task][name] for seed, record in by_seed.items()}
            shipped = {seed: record["metrics"][task][name] for seed, record in runs.get(SHIPPED, {}).items()}
            line.append(_cell(values, None if variant == SHIPPED else shipped))
        lines.append(line)
    return tabulate(lines, header, tablefmt="simple", disable_numparse=True, stralign="right")


def _cell(values: Mapping[int, float | None], shipped: Mapping[int, float | None] | None) -> str:
    known = [value for value in values.values() if value is not None]
    if not known:
        return "-"
    text = _spread(known, ".4f")
    if shipped is None:
        return text
    pairs = ((value, shipped.get(seed)) for seed, value in values.items())
    differences = [value - other for value, other in pairs if value is not None and other is not None]
    return f"{text}\n{_spread(differences, '+.4f')}" if differences else text


def _spread(values: Sequence[float], form: str) -> str:
    deviation = f"±{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def tables(out: Path) -> str:
    """The table of every data set; of several results of one run the last counts. Raises UserError where there are none."""
    found = {(r["dataset"], r["variant"], r["seed"]): r for r in read_lines(out / "results.jsonl")}
    if not found:
        raise UserError(f"{out}/results.jsonl has no results yet")
    names = list(dict.fromkeys(dataset for dataset, _, _ in found))
    parts = [f"{name}\n{table(found.values(), name)}" for name in names]
    commits = sorted({record["commit"] for record in found.values()})
    notes = ["ne, nrmse: lower is better; gap: higher; second lines: difference to shipped, seed by seed"]
    if len(commits) > 1:
        notes.append(f"runs of several versions of the code are mixed: {', '.join(commits)}")
    return "\n\n".join([*parts, "\n".join(notes)])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["prepare", "run", "table"])
    parser.add_argument("--data", type=Path, default=Path("runs/study/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/study/results"))
    parser.add_argument("--datasets", default=",".join(DATASETS), help="some of %(default)s")
    parser.add_argument("--variants", type=Path)
    parser.add_argument("--base", nargs="*", default=[], metavar="OVERRIDE", help="of every variant, shipped too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="prepare: preprocess anew, from the same raw logs")
    options = parser.parse_args(arguments)
    names = options.datasets.split(",")
    with user_errors():
        if unknown := set(names) - DATASETS.keys():
            raise UserError(f"--datasets: no {', '.join(sorted(unknown))}; there are {', '.join(DATASETS)}")
        if options.action == "prepare":
            prepare(options.data, names, options.again)
            return
        if options.action == "run":
            bound_resolvers()
            variants = variants_of(options.variants)
            run(
                jobs_of(options.data, options.out, names, variants, options.base, options.seeds),
                options.out,
                options.workers,
            )
        print(tables(options.out))


if __name__ == "__main__":
    main()
