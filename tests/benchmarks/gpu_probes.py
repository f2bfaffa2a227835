"""What gpu.py sees of a trainer at work: time and kernels of a step, copies, waits of the host; and a time limit."""

import inspect
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from features.batch import Batch
from pipeline.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
PACKAGES = tuple(f"{REPOSITORY / name}/" for name in ("features", "models", "pipeline", "jobs"))
AGAIN_S = 5
SYNC = "called a synchronizing CUDA operation"  # torch's warning where the host waits for the device


class TimeLimitError(Exception):
    """A limit of seconds is over."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitError once the block takes longer; in the main thread, when Python next has the control.

    It does so again every few seconds: what is raised inside a finaliser is lost.
    """

    def end(*_: Any) -> None:
        raise TimeLimitError(f"over {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, end)
    begin, (left, again) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # a limit around this one
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begin), 1e-3), again)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps_of(trainer: Trainer, batches: Sequence[Batch]) -> Iterator[None]:
    """Steps as the trainer takes them, on batches that are decoded already: one for each `next`."""
    learner = trainer.learner
    for step, batch in enumerate(learner.feed(cycle(batches), 1 << 30)):
        output = learner.forward(batch, step)
        trainer.check_losses(output)
        norm = learner.backward()
        trainer.check_gradients(norm)
        learner.update()
        trainer.record(output)
        yield


def events_of(run: Callable[[], object], times: int, device: torch.device) -> list[Any]:
    """The profiler's events of so many calls."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(times):
            run()
        synchronise(device)
    return list(profiler.events())


def on_device(events: Iterable[Any], device: torch.device) -> list[Any]:
    """Those that ran on the device; on a CPU the operators that no other one called."""
    if device.type == "cuda":
        return [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [e for e in events if e.cpu_parent is None and "::" in e.name]


def kernels(events: Iterable[Any], device: torch.device) -> list[Any]:
    """The same without copies and fills."""
    return [e for e in on_device(events, device) if not e.name.startswith(("Memcpy", "Memset"))]


def busy_us(events: Iterable[Any]) -> float:
    """Microseconds in which at least one of the events ran."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(stop - max(begin, end), 0.0)
        end = max(end, stop)
    return total


def copies(events: Iterable[Any], device: torch.device) -> Counter[str]:
    """Copies by kind, such as "HtoD (Pageable -> Device)"."""
    found = on_device(events, device)
    return Counter(e.name.removeprefix("Memcpy ") for e in found if e.name.startswith("Memcpy"))


@contextmanager
def host_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """Counts the waits of the host for the device by where the package causes them; none on a CPU.

    What torch does not notice is missing: synchronize() of events and streams, and collectives.
    """
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if SYNC in str(message):
            found[innermost()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def innermost() -> str:
    """Where the innermost function of the package on the stack is, as path:line function; else the benchmark."""
    frame = inspect.currentframe()
    while frame is not None:
        if (path := frame.f_code.co_filename).startswith(PACKAGES):
            return f"{path.removeprefix(f'{REPOSITORY}/')}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"


def take(trainer: Trainer, batches: Sequence[Batch], warmup: int, timed: int) -> dict[str, Any]:
    """Steps of one trainer: seconds until the first is done, then milliseconds, kernels and copies of one."""
    device, steps = trainer.device, steps_of(trainer, batches)
    begin = time.perf_counter()
    next(steps)
    synchronise(device)
    first_s = time.perf_counter() - begin
    for _ in range(warmup):
        next(steps)
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(timed):
        next(steps)
    synchronise(device)
    step_us = (time.perf_counter() - begin) / timed * 1e6
    profiled = max(timed // 4, 1)
    events = events_of(lambda: next(steps), profiled, device)
    trainer.nonfinite.check(0)
    ran = kernels(events, device)
    exchange = [e for e in ran if "nccl" in e.name.lower()]
    figures = {
        "ms": step_us / 1e3,
        "rows/s": len(batches[0].row_id_B) * trainer.ranks / step_us * 1e6,
        "kernels": round(len(ran) / profiled),
        "first step (s)": first_s,
    }
    if device.type == "cuda":  # of the time without a profiler, which slows the host down and not the device
        figures |= {"busy": busy_us(ran) / profiled / step_us, "exchange": busy_us(exchange) / profiled / step_us}
        figures |= {"GiB": torch.cuda.max_memory_allocated(device) / 2**30}
    return figures
