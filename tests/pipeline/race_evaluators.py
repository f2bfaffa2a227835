"""A trainer and evaluators against each other: race_evaluators.py RUN SEED prints what is left as one JSON line.

RUN is a finished run, whose checkpoints the trainer commits again under other steps and weights: it prunes by train.keep's
rules, rolls back, and leaves half-written and damaged checkpoints. Two evaluators follow; each is killed now and then, and
started again.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from pipeline.quick_imports import quick_imports

with quick_imports():
    import torch.utils.tensorboard  # noqa: F401  here, and not in each of its children

    from pipeline.evaluation import follow
    from pipeline.evaluation.follow import EvaluateConfig, evaluate
    from pipeline.run import checkpoint, records
    from pipeline.run.retention import Keep, prune
    from pipeline.run.run import Run
    from pipeline.storage.files import read_lines

STEPS = 24
PATIENCE = 20.0  # seconds that the trainer waits for a record
QUICK = {"buckets": 2, "cold_start": False, "by_time": []}  # few slices


def evaluator(path: Path, order: str) -> int:
    """The process of an evaluator that follows; it prints its log to a file."""
    if child := os.fork():
        return child
    log = os.open(path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    list(evaluate(EvaluateConfig(run=path, threads=1, follow=True, idle=False, order=order, **QUICK)))
    os._exit(0)


def commit(run: Run, source: Path, step: int, weights: int) -> str:
    """A checkpoint with the tensors of another one, as the trainer commits it; returns its checksum."""
    final = checkpoint.folder(run.checkpoints, step)
    staging = final.with_name(f".{final.name}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    manifest = checkpoint.read(staging).model_copy(update={"step": step, "seed": weights})
    sealed = manifest.sealed(manifest.files)
    (staging / "manifest.json").write_text(sealed.model_dump_json())
    if final.exists():
        checkpoint.remove(final, wait=True)
    staging.rename(final)
    return sealed.checksum


def wait_for_record(run: Run) -> None:
    """Returns once eval.jsonl has another line than now, or after PATIENCE."""
    before, begin = len(list(read_lines(run.eval_metrics))), time.monotonic()
    while len(list(read_lines(run.eval_metrics))) == before and time.monotonic() - begin < PATIENCE:
        time.sleep(0.01)


def damage(run: Run, step: int) -> None:
    """Cuts a file of a checkpoint, or its manifest, as a broken disk does."""
    path = checkpoint.folder(run.checkpoints, step)
    file = path / ("manifest.json" if step % 2 else "rank-00000.bin")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])


def main(path: Path, seed: int) -> None:
    rng, run = random.Random(seed), Run(path)
    follow.POLL_INTERVAL = 0.01
    sources = path.with_name("sources")
    run.checkpoints.rename(sources)
    run.checkpoints.mkdir()
    folders = sorted(sources.iterdir())
    run.write_status("training", 0, STEPS)
    processes = {order: evaluator(path, order) for order in ("oldest", "newest")}
    committed, kills, step, damaged = set(), 0, 0, False
    for event in range(2 * STEPS):
        if damaged or rng.random() < 0.15:  # roll back, where anything is wrong
            step = max(0, step - rng.randint(1, 2))
        step = min(step + 1, STEPS)
        committed.add((step, commit(run, rng.choice(folders), step, event)))
        run.write_status("training", step, STEPS)
        damaged = rng.random() < 0.15 and not damaged
        if damaged:
            damage(run, step)
        if rng.random() < 0.3:
            (run.checkpoints / f".step-{step + 1:08d}").mkdir(exist_ok=True)  # half-written
        prune(run, Keep(last=4), "", newest=step)
        if event % 3 == 0:  # the evaluators keep up now and then, however slow the machine is
            wait_for_record(run)
        time.sleep(rng.uniform(0, 0.1))
        if rng.random() < 0.25:
            order = rng.choice(sorted(processes))
            os.kill(processes[order], signal.SIGKILL)
            os.waitpid(processes[order], 0)
            kills += 1
            processes[order] = evaluator(path, order)
    last = commit(run, folders[0], step, -1)
    committed.add((step, last))
    run.write_status("finished", step, step)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in processes.values()]
    dataset = follow.dataset_of(run, EvaluateConfig(run=path)).name
    now = {at: records.checksum(run, at) for at in checkpoint.steps(run.checkpoints)}
    whole = [at for at, checksum in now.items() if checksum]
    lines = [(line["step"], line["checkpoint"]) for line in read_lines(run.eval_metrics)]
    print(json.dumps({
        "codes": codes, "kills": kills, "lines": lines, "unknown": sorted(set(lines) - committed),
        "whole": whole, "current": sorted(records.current(run, "test", dataset)), "committed": len(committed),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
