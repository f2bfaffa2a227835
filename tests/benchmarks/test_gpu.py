"""gpu.py works before it meets a GPU: its small form on this CPU, and what only a GPU reaches on doubles of torch.cuda."""

import json
import signal
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_probes
import gpu_sections
import pytest
import torch
from gpu_sections import Bench, Case
from torch.autograd import DeviceType

from pipeline.training.micro_batches import loss_by_micro_batches

CUDA = torch.device("cuda", 0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is traced, and no kernels are written."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, mode, **rest: compile_(run, backend="eager", **rest))


@pytest.mark.integration
@pytest.mark.usefixtures("traced")
def test_the_small_form_answers_every_section_of_one_device_and_goes_on_after_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Bench) -> list[Any]:
        raise RuntimeError("no such GPU")

    titles = [title for title in gpu.SECTIONS if title != "two GPUs"]  # it starts processes
    monkeypatch.setattr(gpu, "SECTIONS", {"broken": broken} | gpu.SECTIONS)
    assert gpu.main([str(tmp_path), "--small", "--sections", "broken", *titles]) == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    found = content["sections"]
    assert found.pop("broken")["error"] == "RuntimeError: no such GPU"
    assert list(found) == titles
    assert [found[title].get("error") for title in titles] == [None] * len(titles)
    assert [row["ok"] for row in found["trains"]["rows"]] == [True, True]
    assert [row.get("error") for row in found["steps"]["rows"]] == [None] * len(gpu_sections.SMALL_CASES)
    assert all(row["kernels"] > 20 and row["ms"] > 0 for row in found["steps"]["rows"])
    assert all(row["rows/s"] > 0 for row in found["loader"]["rows"])
    report = (tmp_path / "gpu.md").read_text()
    assert all(f"## {title}" in report for title in ["broken", *titles])
    assert report.count("| mmoe") == 2
    assert "no such GPU" in capsys.readouterr().err


def event(name: str, begin: float, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=begin, end=end), device_type=device, is_user_annotation=annotation
    )


EVENTS = [
    event("Memcpy HtoD (Pageable -> Device)", 0, 2),
    event("Memcpy HtoD (Pinned -> Device)", 0, 1),
    event("Memcpy HtoD (Pinned -> Device)", 1, 2),
    event("Memset (Device)", 2, 3),
    event("void gemm<float>", 10, 14),
    event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 12, 20),
    event("void gemm<float>", 30, 31),
    event("nccl:all_reduce", 0, 90, annotation=True),
    event("aten::mm", 0, 99, DeviceType.CPU),
    event("cudaLaunchKernel", 0, 99, DeviceType.CPU),
]


def test_kernels_copies_and_busy_time_of_a_gpu_are_those_of_its_own_events() -> None:
    assert gpu_probes.copies(EVENTS, CUDA) == {"HtoD (Pinned -> Device)": 2, "HtoD (Pageable -> Device)": 1}
    ran = gpu_probes.kernels(EVENTS, CUDA)
    assert [e.name[:4] for e in ran] == ["void", "nccl", "void"]
    assert gpu_probes.busy_us(ran) == 11  # 10 to 20 and 30 to 31
    assert gpu_probes.busy_us([]) == 0


def test_a_steps_figures_on_a_gpu_are_shares_of_the_time_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    clock = iter([0.0, 3.0, 10.0, 10.0 + 8 * 44e-6])  # of the first step, then of 8
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 << 30)
    monkeypatch.setattr(gpu_probes, "steps_of", lambda *_: iter([None] * 100))
    monkeypatch.setattr(gpu_probes, "events_of", lambda *_: EVENTS)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    checked: list[int] = []
    trainer = SimpleNamespace(device=CUDA, ranks=2, nonfinite=SimpleNamespace(check=checked.append))
    found = gpu_probes.take(trainer, [SimpleNamespace(row_id_B=range(11))], 1, 8)
    # Two profiled steps: 11 us of kernels, 8 of them of the exchange.
    wanted = {"ms": 0.044, "rows/s": 22 / 44e-6, "kernels": 2, "busy": 5.5 / 44, "exchange": 4 / 44, "GiB": 3.0}
    assert found == pytest.approx(wanted | {"first step (s)": 3.0})
    assert (waits, checked) == ([CUDA] * 3, [0])


def test_host_syncs_are_counted_by_the_innermost_function_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run(embedding_SE: torch.Tensor, _: slice) -> tuple[torch.Tensor, torch.Tensor]:
        warnings.warn(f"{gpu_probes.SYNC} (Triggered internally at …)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return embedding_SE.sum(), embedding_SE.detach()

    with gpu_probes.host_syncs(CUDA) as found:
        loss_by_micro_batches(run, torch.zeros(3, 1, requires_grad=True), [], 3)
        warnings.warn(gpu_probes.SYNC, stacklevel=1)
    assert modes == ["warn", "default"]
    (where, number), (other, once) = found.most_common()
    assert where.startswith("pipeline/training/micro_batches.py:")
    assert where.endswith(" _gradients")
    assert (number, other, once) == (3, "outside of the package", 1)


def test_a_limit_ends_a_block_also_after_an_exception_that_was_lost_and_leaves_the_limit_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_probes, "AGAIN_S", 0.02)
    handler = signal.getsignal(signal.SIGALRM)

    def waits_twice() -> None:
        with gpu_probes.limit(0.02):
            with suppress(gpu_probes.TimeLimitError):
                time.sleep(5)
            time.sleep(5)

    with gpu_probes.limit(30):
        with pytest.raises(gpu_probes.TimeLimitError):
            waits_twice()
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 20 < left <= 30
    assert signal.getsignal(signal.SIGALRM) is handler


def test_a_case_that_takes_too_long_is_no_failure_and_one_that_breaks_is() -> None:
    def slow() -> Any:
        time.sleep(5)

    def breaks() -> Any:
        raise ValueError("bad")

    assert gpu_sections.guarded(slow, 0.02) == {"error": "over 0 s"}
    assert gpu_sections.guarded(breaks, 5) == {"error": "ValueError: bad", "ok": False}


def on_gpu(tmp_path: Path, end: float = 1e9) -> Bench:
    return Bench(tmp_path, CUDA, small=True, end=end)


def test_cases_are_left_out_where_no_time_is_left_for_two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu_sections, "measured", lambda *_: {"ms": 1.0})
    monkeypatch.setattr(gpu_sections, "SMALL_CASES", [Case("mmoe"), Case("mmoe", precision="fp8")])
    enough = gpu_sections.steps(on_gpu(tmp_path, time.monotonic() + gpu_sections.RANKS_S + 60))
    short = gpu_sections.steps(on_gpu(tmp_path, time.monotonic() + gpu_sections.RANKS_S - 1))
    assert [row.get("error") for row in enough] == [None, "no such setting"]
    assert [row.get("error") for row in short] == ["no time left", "no such setting"]


def test_a_gpus_memory_is_free_before_each_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(gpu_sections, "prepare", lambda *arguments: called.append(str(arguments[2])))
    gpu_sections.trainer_of(on_gpu(tmp_path), "demo", "mmoe", batch_size=8)
    assert called == ["empty_cache", "reset_peak_memory_stats", "cuda:0"]


def test_losses_of_a_gpu_are_compared_with_a_process_that_sees_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []

    def write(run: Path, rows: int) -> None:
        (run / "metrics").mkdir(parents=True, exist_ok=True)
        (run / "metrics" / "train.jsonl").write_text("".join(f'{{"loss": {rows + n / 1e4}}}\n' for n in range(4)))

    def in_process(command: list[str], env: dict[str, str], **_: Any) -> Any:
        environments.append(env)
        write(Path(gpu.parse(command[2:]).reference[1]), 1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu_sections, "train", lambda data, run, rows, end, device: write(run, 1))
    monkeypatch.setattr(gpu_sections.subprocess, "run", in_process)
    assert [row["ok"] for row in gpu_sections.trains(on_gpu(tmp_path))] == [True, True]
    assert environments[0]["CUDA_VISIBLE_DEVICES"] == ""
    found = [
        gpu_sections.compared([loss], [1.0], "", steps)["ok"] for loss, steps in ((1.00005, 1), (1.001, 1), (1, 2))
    ]
    assert found == [True, False, False]


def test_a_machine_with_one_gpu_says_so_and_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H200", total_memory=139 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert gpu_sections.two_gpus(on_gpu(tmp_path)) == [{"ranks": 1, "error": "this machine has one GPU"}]
    found = gpu.hardware(CUDA)
    assert (found["gpu"], found["gpus"], found["GiB"], found["nccl"]) == ("H200", 1, 139.0, "2.27.5")
