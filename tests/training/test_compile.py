"""train.compile: every model is one graph, which computes what the model does, and a run is the same with and without."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dataset_from_rows import parse_text
from pydantic import ValidationError
from small_architecture import small_architecture, small_supernet
from tiny_training import SCHEMA, assert_close, configuration, last, raw_rows, task_loss
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from features.batch import Batch, Rows
from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.schema.schema import Schema
from models.fusion import FUSIONS
from models.fusion.decomposition import TrainedModel
from models.fusion.emm import EMM
from models.ranker import ModelConfig, Ranker, is_table
from pipeline.training.compiled import compiled
from pipeline.training.config import Settings
from pipeline.training.step import LossesOfRows, TrainStep
from pipeline.training.train import prepare

CONF = Path(__file__).parents[2] / "jobs" / "conf" / "model"
ROWS = 8
TASKS = SCHEMA["tasks"] | {"spent": {"kind": "regression", "label": "dwell", "loss": "ziln"}}
DENSE = {"age": {"missing_flag": True, "piecewise": 4}, "price": {"transform": "log1p"}}
SEQUENCES = {"recent": {"table": "item", "max_length": 5, "pooling": "sequence"}, "topics": {"dim": 8}}
SMALL = {"name": "mmoe", "num_experts": 2, "levels": [[8]]}
# What each model of jobs/conf/model is compiled with: the parts around a fusion are spread over the models. Those that are
# left out have the class and the options of another one, in other numbers.
PARTS: dict[str, dict[str, Any]] = {
    "adatt": {"interaction": {"name": "dot"}, "calibration": "monotone"},
    "aitm": {},
    "apem": {},
    "automtl": {"fusion": {"name": "automtl", "architecture": small_architecture(list(TASKS))}},
    "autotask": {"fusion": {"name": "autotask", "width": 16, "examples": "tasks"}},
    "autotask mixed": {"fusion": {"name": "autotask", "width": 16, "examples": "mixed"}},
    "cgc": {},
    "cross_stitch": {
        "interaction": {"name": "cross", "layers": 1},
        "tower": {"click": [4], "conversion": [], "dwell": [4, 4], "spent": []},
    },
    "dtrn": {},
    "emm": {"fusion": {"name": "single_task", "widths": [8, 4]}, "from": None},  # in whose place `emm` comes
    "escm2": {"dropout": 0.2, "input_dropout": 0.2},
    "esmm": {},
    "home": {},
    "multitab": {},
    "pepnet": {},
    "ple": {"fusion": {"name": "ple", "levels": [[8], [4]], "task_experts": [1, 2, 1, 1], "shared_experts": [1, 2]}},
    "shared_bottom": {"interaction": {"name": "attention", "layers": 1}},
    "stem": {},
    "supernet": {"fusion": small_supernet()},
}
READING = ("dtrn", "apem")  # sequences
WITH_LOSSES = ("escm2", "esmm", "shared_bottom", "aitm")


@cache
def data(sequences: bool) -> tuple[Schema, Encoders, list[Batch]]:
    """Two batches of a schema with codes of numbers, a given task and one with three numbers."""
    changes = {"dense": DENSE, "tasks": TASKS} | ({"bag": SEQUENCES} if sequences else {})
    schema = Schema.parse(SCHEMA | changes, "small.yaml")
    found = parse_text(schema, raw_rows(2 * ROWS))
    encoders = Encoders.fit(schema, Statistics.of(schema, found))
    rows = Rows.decode(encoders.encode(found), schema)
    return schema, encoders, [rows.slice(at, at + ROWS).batch(schema, ROWS) for at in (0, ROWS)]


def step_of(content: dict[str, Any], sequences: bool = False) -> tuple[TrainStep, list[tuple[Tensor, Batch]]]:
    """A step in float64 and what two batches give to its dense part."""
    schema, encoders, batches = data(sequences)
    ranker = Ranker(schema, encoders, ModelConfig(**content), device="cpu").double()
    inputs = [
        (ranker.embedded(batch).detach().double(), replace(batch, dense_BD=batch.dense_BD.double()))
        for batch in batches
    ]
    return TrainStep(ranker, task_loss(schema), bf16=False), inputs


def of_conf(name: str) -> dict[str, Any]:
    path = CONF / f"{name}.yaml"
    return (yaml.safe_load(path.read_text()) if path.exists() else {}) | PARTS.get(name, {})


def emm(step: TrainStep) -> EMM:
    """Two trained models of the first task and one of each other one, for the input of a step."""
    in_dim, tasks = step.ranker.interaction.out_dim, len(TASKS)
    models = [TrainedModel(f"m{t}", t, in_dim, widths) for t, widths in enumerate([[8, 4]] * tasks)]
    models.append(TrainedModel("other", 0, in_dim, [8, 6, 4]))
    return EMM(in_dim, tasks, models, one_input=True).double()


def test_every_fusion_and_every_model_of_the_configs_is_among_those_compiled() -> None:
    content = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    known = {FUSIONS["emm"]} | {FUSIONS[of_conf(name)["fusion"]["name"]] for name in PARTS}
    assert set(FUSIONS.values()) == known
    assert {FUSIONS[model["fusion"]["name"]] for model in content.values()} <= known
    assert {model["given"]["name"] for model in content.values() if "given" in model} == {"esmm", "dr"}


@pytest.mark.integration  # most of a second each
@pytest.mark.parametrize("name", PARTS)
def test_a_model_is_one_graph_that_computes_what_it_does(name: str) -> None:
    step, inputs = step_of(of_conf(name), name in READING)
    if name == "emm":
        step.ranker.fusion = emm(step)
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    part = step.row_losses if name in WITH_LOSSES else step.ranker.dense_outputs  # a third of the time is the losses'
    run = torch.compile(part, backend=backend, fullgraph=True, dynamic=False)
    for embedding_BE, batch in inputs:
        found, wanted = (seeded(each, embedding_BE, batch) for each in (run, part))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


class MainMemory(TorchDispatchMode):
    """Finds operators that read or make a tensor that is not on the meta device, which stands for a GPU here."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.device.type != "meta" for leaf in tree_leaves((args, kwargs, out))):
            self.found.add(str(func))
        return out


@pytest.mark.parametrize("name", sorted(PARTS.keys() - {"autotask mixed"}))  # which counts what is observed
def test_a_models_step_on_a_device_touches_no_tensor_of_main_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the meta device does not have
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    step, [(embedding_BE, batch), _] = step_of(of_conf(name), name in READING)
    if name == "emm":
        step.ranker.fusion = emm(step)
    step.to("meta")
    moved = {f.name: getattr(batch, f.name).to("meta") for f in fields(batch) if f.name not in ("sparse", "single")}
    leaf_BE = embedding_BE.to("meta").requires_grad_()
    with MainMemory() as mode:
        rows = step.row_losses(leaf_BE, replace(batch, **moved))
        rows.loss_BT.sum().backward()
    assert mode.found == set()


def seeded(run: Callable[[Tensor, Batch], Any], embedding_BE: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    found = run(embedding_BE, batch)
    return (found,) if isinstance(found, Tensor) else tuple(part for part in found if part is not None)


def test_what_checks_read_some_steps_later_is_no_output_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    step, [arguments, _] = step_of({"fusion": SMALL})
    output_BT = torch.zeros(2, 3)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: LossesOfRows(output_BT, output_BT, None))
    rows = compiled(step, "reduce-overhead")(*arguments)
    output_BT.fill_(torch.nan)  # as the next step does
    assert not rows.shown_BT.any()


def test_the_compiled_gradients_are_those_of_the_model_with_its_draws() -> None:
    step, inputs = step_of({"fusion": SMALL, "dropout": 0.2, "input_dropout": 0.2})
    torch._dynamo.reset()
    run = torch.compile(step.row_losses, backend="aot_eager", fullgraph=True, dynamic=False)
    parameters = [p for name, p in step.ranker.named_parameters() if not is_table(name)]
    for embedding_BE, batch in inputs[:1]:
        leaf_BE = embedding_BE.requires_grad_()
        found, wanted = (
            torch.autograd.grad(seeded(each, leaf_BE, batch)[0].sum(), (leaf_BE, *parameters))
            for each in (run, step.row_losses)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that are asked for; what is compiled is traced, and no kernels are written."""
    modes, compile_ = [], torch.compile

    def traced(function: Callable[..., Any], mode: str, **arguments: Any) -> Callable[..., Any]:
        modes.append(mode)
        torch._dynamo.reset()
        return compile_(function, backend="eager", **arguments)

    monkeypatch.setattr(torch, "compile", traced)
    return modes


@pytest.mark.parametrize("more", [{"pipelined": True}, {"accumulate": 2, "precision": "bf16"}])
def test_a_run_is_the_same_with_and_without_also_where_one_goes_on_with_the_other(
    folder: Path, device: torch.device, backends: list[str], more: dict[str, Any]
) -> None:
    name = next(iter(more))
    for end, mode in ((5, "default"), (8, None)):
        config = configuration(
            folder / "data", folder / f"{name}-begun", dropout=0.2, compile=mode, max_steps=end, **more
        )
        prepare(config, None, device).run_to_end()
    assert backends == ["default"]
    prepare(
        configuration(folder / "data", folder / f"{name}-plain", dropout=0.2, max_steps=8, **more), None, device
    ).run_to_end()
    assert_close(last(folder / f"{name}-begun"), last(folder / f"{name}-plain"), rtol=1e-5, atol=1e-6)


def test_cuda_graphs_begin_a_step_with_each_forward(backends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    step, inputs = step_of({"fusion": SMALL})
    for mode in ("default", "reduce-overhead"):
        run = compiled(step, mode)
        for embedding_BE, batch in inputs:
            run(embedding_BE, batch)
    assert (backends, len(begun)) == (["default", "reduce-overhead"], len(inputs))


def test_what_cannot_be_compiled_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = step_of({"fusion": {"name": "autotask", "width": 8, "examples": "mixed"}})
    words = r"train.compile=reduce-overhead: this fusion .*model.fusion.examples.*: set train.compile=default"
    with pytest.raises(UserError, match=words):
        compiled(step, "reduce-overhead")
    assert compiled(step, "default")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"train.compile=default: this machine has no C compiler"):
        compiled(step_of({"fusion": SMALL})[0], "default")


@pytest.mark.parametrize("more", [{"accumulate": 2}, {"dense_parallel": "fsdp"}])
def test_cuda_graphs_are_refused_where_memory_moves_between_steps(more: dict[str, Any]) -> None:
    assert Settings(compile="default", **more).compile == "default"
    with pytest.raises(ValidationError, match=r"compile=reduce-overhead replays .*: use compile=default"):
        Settings(compile="reduce-overhead", **more)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_gradients_are_dropped_and_not_zeroed_in_place_before_a_step(
    folder: Path, device: torch.device, clip_norm: float | None
) -> None:
    """A CUDA graph writes each step's gradients to the same memory: kept, the old ones would be added to themselves."""
    config = configuration(folder / "data", folder / f"dropped-{clip_norm}", max_steps=1, clip_norm=clip_norm)
    made = prepare(config, None, device)
    made.run_to_end()
    parameters = list(made.learner.dense.params.values())
    assert any(parameter.grad is not None for parameter in parameters)
    made.learner.optimizer.zero_grad()
    assert [parameter.grad for parameter in parameters] == [None] * len(parameters)
