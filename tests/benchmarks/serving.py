"""How fast a package answers, beside what it is measured against: python tests/benchmarks/serving.py [SECTION ...].

adatt, trained on Census-Income by recipe=census (dataset, run and packages stay in --folder), scores rows of the test split:

    taskfuse      a package: tables in 32, 16, 8 or 4 bits, the exported or the compiled program; from dictionaries as a client
                  sends them to probabilities, or from encoded rows on
    eager         (a) the checkpoint as evaluation loads it: from encoded rows, and from dictionaries by way of preprocessing
    torch-rechub  (b) its PLE at adatt's sizes, as its ONNXExporter writes it, under onnxruntime, from encoded rows
    LightGBM      (c) a model a task, 200 trees of 63 leaves, from encoded rows (serving_contenders.py has both)

Sections:

    latency   p50 and p99 of requests of 1, 32 and 512 rows, and rows/s of 8,192; 16 different requests in turn
    quality   NE by format of the tables on the test split
    size      bytes on disk by format, beside the checkpoint and the contenders' files
    start     from the start of a process to its first answer
    load      the server under load: requests/s, p99, errors; bad requests; memory (serving_server.py)
    profile   where the time of a request from dictionaries goes; nothing is kept

Each library computes on one thread, and all of a section on one core; the load comes from another. Contenders take turns
within a round and ratios are taken within it, since the machine's speed changes; printed are p50 and p99 of the calls of all
rounds and the median ratio. What was found goes to results/serving.json, section by section. Goals are printed last.
"""

import argparse
import cProfile
import gc
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import serving_server as server
import torch
from serving_contenders import Scores, lightgbm, one_thread, rechub
from serving_workload import FORMATS, Workload, prepare
from tabulate import tabulate
from train_runs import RESULTS, machine

from pipeline.malloc import tune_malloc
from pipeline.serving.scorer import Scorer

HERE = Path(__file__).parent
RECHUB = HERE.parents[1] / ".venv" / "rechub"
SIZES, LARGE = (1, 32, 512), 8192  # rows of a request
REQUESTS = 16  # different ones of a size
EAGER, SLOW, ONNX, TREES = "eager, encoded", "eager, dicts", "torch-rechub, encoded", "LightGBM, encoded"
BEST, FULL = "compiled, fp32, encoded", "compiled, fp32, dicts"  # those of the goals
GOAL_MS, GOAL_NE = 10.0, 1e-3
SECTIONS = ("latency", "quality", "size", "start", "load", "profile")
Call = Callable[[], object]
Found = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Runs the sections, prints their tables and the goals, keeps what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", default=[], help=f"of {', '.join(SECTIONS)}; without one, all but profile"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/serving"))
    parser.add_argument("--dataset", type=Path, help="of the census, instead of one of the benchmark's own")
    parser.add_argument("--run", type=Path, help="of adatt on it, instead of one of the benchmark's own")
    parser.add_argument("--formats", nargs="*", default=FORMATS, help="of tables")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=100, help="of a size in a round")
    parser.add_argument("--seconds", type=float, default=10, help="of a load")
    parser.add_argument("--soak", type=float, default=300, help="seconds of the load over which memory is measured")
    parser.add_argument("--no-results", action="store_true", help="a trial: nothing is kept in results/")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - {*SECTIONS}:
        parser.error(f"no section {min(unknown)}: {', '.join(SECTIONS)}")
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    work = prepare(options.folder.resolve(), options.epochs, options.dataset, options.run)
    for form in options.formats:
        work.package(form)
    os.sched_setaffinity(0, {cores[0]})
    tune_malloc()
    form = [*options.formats, "fp32"][0]
    parts: dict[str, Callable[[], Found]] = {
        "latency": partial(latency, work, options),
        "quality": partial(quality, work, options.formats),
        "size": partial(sizes, work, options.formats),
        "start": partial(server.starts, work, form),
        "load": partial(server.load_tests, work, options, (cores[0], cores[-1])),
        "profile": partial(profile, work, form),
    }
    file = RESULTS / "serving.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    for name in options.sections or [name for name in SECTIONS if name != "profile"]:
        found = parts[name]()
        if name != "profile" and not options.no_results:
            kept |= {"machine": machine(), name: found}
            file.write_text(json.dumps(kept, indent=1) + "\n")
        print(goals({name: found}), flush=True)


def latency(work: Workload, options: argparse.Namespace) -> Found:
    """p50 and p99 of every contender, in ms; rows/s of large requests; the ratio of the p50 at 512 rows to (b)."""
    makers = contenders(work, options)
    sizes = (*SIZES, LARGE)
    calls = {name: {size: requests(make, size) for size in sizes} for name, make in makers.items()}
    seconds: dict[str, dict[int, list[list[float]]]] = {name: {size: [] for size in sizes} for name in makers}
    for number in range(options.rounds):
        for size in sizes:
            for name in makers:
                count = max(options.calls // 20, 2) if size == LARGE else options.calls
                seconds[name][size].append(timed(calls[name][size], count))
        print(f"latency: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    found = {name: figures(of_size) for name, of_size in seconds.items()}
    for name, of_size in seconds.items():
        other = seconds.get(ONNX, of_size)[max(SIZES)]
        pairs = zip(of_size[max(SIZES)], other, strict=True)
        found[name]["x rechub"] = statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)
    columns = [f"{size} rows {p}" for size in SIZES for p in ("p50", "p99")] + ["rows/s", "x rechub"]
    lines = [[name, *(each[column] for column in columns)] for name, each in found.items()]
    formats = ("", *[".3f"] * (2 * len(SIZES)), ",.0f", ".2f")
    print(tabulate(lines, ["ms", *columns], floatfmt=formats, tablefmt="pipe", disable_numparse=[0]))
    print(f"x rechub: p50 of (b) at {max(SIZES)} rows over that of the line, median of {options.rounds} rounds")
    return found


def contenders(work: Workload, options: argparse.Namespace) -> dict[str, Callable[[int, int], Call]]:
    """By name: what prepares a call, from the first row and how many."""
    sys.path.append(str(RECHUB))  # last: it has only what the environment lacks
    made: dict[str, Callable[[int, int], Call]] = {}
    for program, form in ((p, f) for p in ("exported", "compiled") for f in options.formats):
        scorer = Scorer.load(work.package(form), compiled=program == "compiled")
        made[f"{program}, {form}, dicts"] = lambda at, n, s=scorer: partial(s.score, work.raw_rows[at : at + n])
        made[f"{program}, {form}, encoded"] = lambda at, n, s=scorer: partial(s.score_encoded, work.encoded(at, n))
    score = work.slow_path()
    made[SLOW] = lambda at, n: partial(score, work.raw_rows[at : at + n])
    made[EAGER] = lambda at, n: partial(work.weights, work.batch(at, n))
    for name, scores in others(work).items():
        made[name] = lambda at, n, s=scores: s(work.columns(at, n))
    return made


def others(work: Workload) -> dict[str, Scores]:
    """What is not taskfuse's."""
    tasks = len(work.dataset.schema.tasks)
    try:
        onnx, _ = rechub(work.folder, *work.table_sizes(), work.dataset.schema.dense_width, tasks)
        trees, _ = lightgbm(work.folder, work.columns(0, work.split("train").num_rows, work.split("train")))
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: make .venv/rechub installs the contenders") from None
    return {ONNX: onnx, TREES: trees}


def requests(make: Callable[[int, int], Call], size: int) -> list[Call]:
    """Different requests of a size, ready to be sent; of the largest one only."""
    return [make(index * size, size) for index in range(1 if size == LARGE else REQUESTS)]


def timed(calls: list[Call], count: int) -> list[float]:
    """Seconds of each of some calls, after a few that are not timed."""
    clock, seconds = time.perf_counter, []
    gc.collect()
    for call in calls[:3]:
        call()
    for index in range(count):
        call = calls[index % len(calls)]
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return seconds


def figures(seconds: Mapping[int, list[list[float]]]) -> dict[str, float]:
    """Of one contender."""
    found = {}
    for size in SIZES:
        ordered = sorted(1e3 * second for round_ in seconds[size] for second in round_)
        found[f"{size} rows p50"] = ordered[len(ordered) // 2]
        found[f"{size} rows p99"] = ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]
    found["rows/s"] = LARGE / statistics.median(second for round_ in seconds[LARGE] for second in round_)
    return found


def quality(work: Workload, formats: list[str]) -> Found:
    """NE of each task on the test split by format of the tables, and the largest difference to fp32; LightGBM's beside it."""
    rows = work.test.num_rows
    label_NT = work.columns(0, rows).label_NT  # all observed
    found: Found = {}
    for form in formats:
        logit_NT = Scorer.load(work.package(form)).score_encoded(work.encoded(0, rows)).double().numpy()
        found[form] = dict(zip(work.dataset.schema.tasks, entropy(logit_NT, label_NT), strict=True))
    lines = [
        [form, *ne.values(), max(abs(ne[task] - found[formats[0]][task]) for task in ne)] for form, ne in found.items()
    ]
    header = ["NE", *work.dataset.schema.tasks, f"largest difference to {formats[0]}"]
    print(tabulate(lines, header, floatfmt=("", *[".6f"] * len(label_NT.T), ".1e"), tablefmt="pipe"))
    return found


def entropy(logit_NT: np.ndarray, label_NT: np.ndarray) -> list[float]:
    """NE of binary tasks from its definition, in float64: cross entropy over that of the labels' mean."""
    label_NT = label_NT.astype(np.float64)
    cross_T = (np.logaddexp(0, logit_NT) - label_NT * logit_NT).mean(0)
    rate_T = label_NT.mean(0)
    return list(cross_T / -(rate_T * np.log(rate_T) + (1 - rate_T) * np.log1p(-rate_T)))


def sizes(work: Workload, formats: list[str]) -> Found:
    """Bytes of the packages and of what they consist of, beside the checkpoint and the contenders' files."""

    def total(*paths: Path) -> int:
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        return sum(file.stat().st_size for file in files)

    found: Found = {}
    for form in formats:
        package = work.package(form)
        parts = {name: total(package / name) for name in ("tables", "encoders", "dense.pt2", "compiled.pt2")}
        found[f"package, {form}"] = {"all": total(package), **parts}
    for name, pattern in (("checkpoint", None), ("torch-rechub", "rechub.onnx*"), ("LightGBM", "lightgbm-*.txt")):
        files = [work.run.checkpoints] if pattern is None else list(work.folder.glob(pattern))
        if files:  # the contenders' are there once `latency` has made them
            found[name] = {"all": total(*files)}
    columns = ["all", "tables", "encoders", "dense.pt2", "compiled.pt2"]
    lines = [[name, *(each.get(column) for column in columns)] for name, each in found.items()]
    print(tabulate(lines, ["bytes", *columns], intfmt=",", tablefmt="pipe"))
    return found


def profile(work: Workload, form: str) -> Found:
    """Prints the time of the parts of a request from dictionaries, and the functions that take longest."""
    for compiled in (False, True):
        scorer = Scorer.load(work.package(form), compiled=compiled)
        for size in SIZES:
            rows = work.raw_rows[:size]
            encoded = scorer.requests.encode(rows)
            embedding_BE = scorer.tables.embed(encoded)
            parts: dict[str, Call] = {
                "all": partial(scorer.score, rows),
                "requests": partial(scorer.requests.encode, rows),
                "tables": partial(scorer.tables.embed, encoded),
                "program": partial(scorer.program, embedding_BE, encoded.dense_BD),
            }
            shown = {name: min(timed([call], 300)) * 1e3 for name, call in parts.items()}
            title = f"{'compiled' if compiled else 'exported'}, {size} rows, ms:"
            print(title, *(f"{name} {ms:.3f}" for name, ms in shown.items()))
            if size != SIZES[1] and not compiled:
                with cProfile.Profile() as profiler:
                    timed([parts["all"]], 200)
                pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    return {}


def goals(found: Mapping[str, Found]) -> str:
    """The goals that the sections decide, each passed or failed."""
    largest, lines = f"{max(SIZES)} rows", []

    def note(what: str, passed: bool) -> None:
        lines.append(f"{'pass' if passed else 'FAIL'}: {what}")

    if "latency" in found and ONNX in found["latency"] and FULL in found["latency"]:
        full, best, onnx = (found["latency"][name] for name in (FULL, BEST, ONNX))
        p99 = full[f"{largest} p99"]
        note(f"p99 of {largest} from dictionaries, {FULL}: {p99:.2f} ms, below {GOAL_MS:.0f}", p99 < GOAL_MS)
        for size in SIZES:
            for p in ("p50", "p99"):
                ours, theirs = (each[f"{size} rows {p}"] for each in (best, onnx))
                note(f"{p} of {size} rows, {BEST}: {ours:.3f} ms, torch-rechub's export {theirs:.3f}", ours < theirs)
    if "quality" in found and {"fp32", "int8"} <= found["quality"].keys():
        fp32, int8 = found["quality"]["fp32"], found["quality"]["int8"]
        largest_ne = max(abs(int8[task] - fp32[task]) for task in fp32)
        note(f"NE of int8 tables: {largest_ne:.1e} from fp32's, within {GOAL_NE}", largest_ne <= GOAL_NE)
    if "load" in found:
        lines += [f"{'pass' if ok else 'FAIL'}: {what}" for what, ok in found["load"]["goals"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    if any(
        os.environ.get(name) != value for name, value in one_thread().items()
    ):  # read once, when libraries are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], one_thread())
    main()
