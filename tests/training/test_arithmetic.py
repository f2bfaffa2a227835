"""TF32 and sums in one order, as torch is set up for them: there is no GPU here."""

import logging
import os
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_training import assert_identical, configuration, last, make_dataset
from torch.utils import deterministic

from pipeline.training.arithmetic import arithmetic
from pipeline.training.config import Settings
from pipeline.training.observer import Observer
from pipeline.training.parallel.hardware import KINDS
from pipeline.training.step import StepOutput
from pipeline.training.train import train
from pipeline.training.trainer import Trainer

PRECISIONS = get_args(Settings.model_fields["precision"].annotation)


def products() -> tuple[str, bool, str]:
    """What cuBLAS, and a reader of each of torch's settings of it, go by; torch.compile reads the first."""
    matmul = torch.backends.cuda.matmul
    return torch.get_float32_matmul_precision(), matmul.allow_tf32, matmul.fp32_precision


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu_tf32_is_on_where_it_is_configured_and_nowhere_else(
    precision: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.set_float32_matmul_precision(before)
    try:
        was = products()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with arithmetic(Settings(precision=precision)):
                wanted = ("high", True, "tf32") if precision == "tf32" else ("highest", False, "ieee")
                assert products() == wanted
            assert products() == was
    finally:
        torch.set_float32_matmul_precision("highest")


def test_every_kind_of_rank_has_a_rate_for_every_precision() -> None:
    for kind in KINDS.values():
        assert set(kind.flops) == set(PRECISIONS)
        assert kind.flops["fp32"] <= kind.flops["tf32"] <= kind.flops["bf16"]


class Flags(Observer):
    """How torch is set up in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        repeatable = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
        self.seen.append((*repeatable, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), products()[0]))


def test_a_deterministic_run_sets_torch_up_for_its_duration_and_on_a_cpu_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, flags = make_dataset(tmp_path / "data"), {"deterministic": Flags(), "plain": Flags()}
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    caplog.set_level(logging.INFO, "pipeline")
    for name, observer in reversed(flags.items()):
        chosen = {"deterministic": True, "precision": "tf32"} if name == "deterministic" else {}
        train(configuration(data, tmp_path / name, max_steps=3, **chosen), observers=[observer])
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert flags["plain"].seen == [(False, True, None, "highest")] * 3
    assert flags["deterministic"].seen == [(True, False, ":4096:8", "highest")] * 3
    assert not torch.are_deterministic_algorithms_enabled()
    assert deterministic.fill_uninitialized_memory
    assert "a CPU has no TF32" in caplog.text
    assert_identical(last(tmp_path / "deterministic"), last(tmp_path / "plain"))
