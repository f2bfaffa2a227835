"""Batches on their way to a GPU, with a stream that writes down what it is asked for in place of a GPU's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import configuration
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from pipeline.dataset.background import in_background, pinned
from pipeline.dataset.loader import Loader
from pipeline.training import loading
from pipeline.training.device_copies import copied_ahead
from pipeline.training.learner import Learner
from pipeline.training.train import prepare

GPU = torch.device("cuda", 1)


def batch(number: int) -> Batch:
    sparse = KeyedJaggedTensor(keys=["a", "b"], values=torch.arange(3), lengths=torch.tensor([1, 0, 1, 1]), stride=2)
    return Batch(
        sparse, torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 1) > 0, torch.ones(2, 1), torch.full((2,), number)
    )


def tensors(some: Batch) -> list[torch.Tensor]:
    values = [some.sparse.values(), some.sparse.lengths(), *(getattr(some, f.name) for f in fields(some))]
    return [value for value in values if isinstance(value, torch.Tensor)]


class Stream:
    """Writes down which stream waits for it, or for which one it waits."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} wait for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    current = ["steps"]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream.name)
        yield
        current.pop()

    def copy(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        assert (device, non_blocking) == (GPU, True)
        found.append(f"{current[-1]} copy")
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps", found))
    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: found.append(f"kept for {stream.name}"))
    return found


def without_repeats(log: list[str]) -> list[str]:
    return [line for n, line in enumerate(log) if n == 0 or line != log[n - 1]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_is_copied_before_the_step_on_the_one_before_it_which_does_not_wait_for_it(
    log: list[str], count: int
) -> None:
    steps = copied_ahead(map(batch, range(count)), GPU, Stream("copies", log))
    log.extend(f"step {int(found.row_id_B[0])}" for found in steps)
    assert log.count("copies copy") == log.count("kept for steps") == count * len(tensors(batch(0)))
    copy, ready = ["copies copy"], ["steps wait for copies", "kept for steps"]
    wanted = {
        0: [],
        1: [*copy, *ready, "step 0"],
        3: [*copy, *ready, *copy, "step 0", *ready, *copy, "step 1", *ready, "step 2"],
    }
    assert without_repeats(log) == wanted[count]


def test_an_iterator_that_is_dropped_lets_go_of_its_batches(log: list[str]) -> None:
    closed = []

    def batches() -> Iterator[Batch]:
        try:
            yield from map(batch, range(5))
        finally:
            closed.append(True)

    copies = copied_ahead(batches(), GPU, Stream("copies", log))
    next(copies)
    del copies
    assert closed == [True]


def test_batches_for_a_gpu_are_pinned_in_the_thread_that_makes_them_and_on_that_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where: list[tuple[str, Any]] = []
    pins: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        where.append((threading.current_thread().name, "pinned"))
        pins.append(tensor.clone())
        return pins[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: where.append((threading.current_thread().name, device))
    )
    made = list(in_background(pinned(map(batch, range(2)), GPU), 2))
    assert where == [("loader", GPU)] + [("loader", "pinned")] * 2 * len(tensors(batch(0)))
    assert {id(tensor) for some in made for tensor in tensors(some)} == {*map(id, pins)}
    where.clear()
    list(in_background(pinned(map(batch, range(2)), torch.device("cpu")), 2))
    assert where == []


def test_a_learner_on_a_gpu_takes_copies_and_one_on_a_cpu_the_batches_themselves(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"{device}", log))
    learner = object.__new__(Learner)
    batches = map(batch, range(1))
    learner.device = torch.device("cpu")
    assert learner.feed(batches, 1) is batches
    learner.device = GPU
    assert len([*learner.feed(batches, 1)]) == 1
    assert "steps wait for cuda:1" in log


def test_a_trainer_reads_with_the_processes_of_its_setting_for_its_device(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked: list[dict[str, Any]] = []

    def made(*arguments: Any, workers: int, device: torch.device, **settings: Any) -> Loader:
        asked.append({"workers": workers, "device": device})
        return Loader(*arguments, **settings)

    monkeypatch.setattr(loading, "Loader", made)
    for name, settings in {"unset": {}, "set": {"decode_workers": 5}}.items():
        prepare(configuration(folder / "data", folder / name, **settings), None, device)
    assert asked == [{"workers": 0, "device": device}, {"workers": 5, "device": device}]
    said = (
        "4 decoding processes a rank, not 5: each of 1 ranks reads 4 of 4 lanes. More need train.lanes, of a new run."
    )
    assert caplog.messages.count(said) == 1
