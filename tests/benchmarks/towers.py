"""Forward and backward of every fusion with its towers, beside plain code and bare matrix products: make bench-towers.

Beside each model of tower_cases.py stand (a) the same maths as research code writes it (tests/references), with
the same weights, and (b) the matrix products that nobody can avoid (matrix_products.py). First it is checked that (a) gives the
same outputs and gradients. Within a round the three alternate, ratios are taken within rounds, and medians are printed:
a machine that slows down slows all three. Gradients of the input and of all parameters are taken.

On a CPU with one thread, times are CPU time of the process, which others on the machine lengthen less than the clock's. MiB
are those of all tensors kept for the backward pass, each memory counted once, without parameters and input.
"""

# Shapes: B rows, T tasks, D width of the input, F fields, W width of a token, K numbers a task.

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matrix_products import floor, seconds
from tabulate import tabulate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tower_cases import CASES, Sizes

from models.fusion import FUSIONS
from models.towers import SharedTower, TaskTowers
from pipeline.malloc import tune_malloc

sys.path.append(str(Path(__file__).parents[1]))

from references import emm, experts, fields
from references.layers import Pair, Reference, Towers, compared, copy_parts

REFERENCES: dict[str, type[Reference]] = {
    "shared_bottom": experts.SharedBottom,
    "single_task": experts.SingleTask,
    "cross_stitch": experts.CrossStitch,
    "mmoe": experts.MMoE,
    "ml_mmoe": experts.MMoE,
    "cgc": experts.PLE,
    "ple": experts.PLE,
    "adatt_sp": experts.AdaTT,
    "adatt": experts.AdaTT,
    "aitm": experts.AITM,
    "emm": emm.EMM,
    "autotask": fields.AutoTask,
    "multitab": fields.MultiTab,
    "apem": fields.APEM,
    "dtrn": fields.DTRN,
}
TASKS = [2, 5, 10, 20]
FIELD_ROWS = 512  # a batch of models that attend over fields: their plain versions would not fit into memory with more
KINDS = {  # operators by words in their names; those without any are the rest
    "matrix products": "mm linear attention gemm",
    "elementwise and sums": "relu threshold add mul div sub softmax sum mean sigmoid gelu norm where masked pow max sqrt rand",
    "copies": "copy cat stack clone index gather scatter fill zero contiguous select slice pad",
}


class Mode(NamedTuple):
    """How numbers are kept and run: fp32, tf32 or bf16; compiled or not."""

    device: str
    precision: str
    compiled: bool

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Autocast, and whether products may be of TF32."""
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            yield


class Model(nn.Module):
    """A fusion and its towers. Shapes: x_BD or x_BFW -> logit_BT."""

    def __init__(self, fusion: nn.Module, towers: nn.Module) -> None:
        super().__init__()
        self.fusion, self.towers = fusion, towers

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.towers(self.fusion(x))
        return out[0] if out.dim() == 3 else out  # ours are out_KBT, the first of K numbers a task is its logit

    def pairs(self, other: "Model") -> Iterator[Pair]:
        """Of a model of references: see references/layers.py."""
        yield from self.fusion.pairs(other.fusion)
        yield from self.towers.pairs(other.towers)


def build(name: str, sizes: Sizes) -> tuple[Model, Model]:
    """Ours and plain, with the same weights."""
    kind, (config, _) = FUSIONS[name.removesuffix("_sp")], CASES[name](sizes)
    shape = (sizes.token, sizes.tasks, sizes.fields) if kind.fields else (sizes.in_dim, sizes.tasks)
    fusion, other = kind(*shape, *([{}] if kind.sequences else []), **config), REFERENCES[name](*shape, **config)
    tower = SharedTower if kind.shared_tower else TaskTowers
    ours = Model(fusion, tower(sizes.tasks, fusion.out_dim, [sizes.tower]))
    plain = Model(other, Towers(sizes.tasks, fusion.out_dim, [sizes.tower], kind.shared_tower))
    copy_parts(plain.pairs(ours))
    return ours, plain


def inputs(name: str, sizes: Sizes, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """x, and the gradient of logit_BT."""
    fields = FUSIONS[name.removesuffix("_sp")].fields
    shape = (sizes.rows, sizes.fields, sizes.token) if fields else (sizes.rows, sizes.in_dim)
    return torch.randn(shape, **kwargs).requires_grad_(), torch.randn(sizes.rows, sizes.tasks, **kwargs)


def differences(name: str, sizes: Sizes) -> dict[str, float]:
    """Largest differences between ours and plain in float64: of outputs, and of gradients of input and parameters."""
    ours, plain = (model.double().eval() for model in build(name, sizes))
    x, probe_BT = inputs(name, sizes, dtype=torch.float64)
    found = compared(ours, plain, x, probe_BT)
    return {what: (one - other).abs().max().item() for what, (one, other) in found.items()}


def check(name: str) -> None:
    """Stops the benchmark if plain is not the same maths."""
    torch.manual_seed(0)
    found = differences(name, Sizes(tasks=3, rows=6, in_dim=12, wide=8, narrow=6, tower=4, fields=3))
    for what, size in found.items():
        if not size < 1e-9:
            raise SystemExit(f"{name}: {what} of plain and ours differ by {size:.1e}: they are not the same maths")


def step(model: nn.Module, x: Tensor, probe_BT: Tensor, mode: Mode) -> None:
    """One forward and backward, gradients from nothing."""
    model.zero_grad()
    x.grad = None
    with mode():
        logit_BT = model(x)
    logit_BT.backward(probe_BT.to(logit_BT.dtype))


def kept_bytes(model: nn.Module, x: Tensor, mode: Mode) -> int:
    """Of tensors that the backward pass needs, parameters and x aside."""
    sizes: dict[int, int] = {}
    aside = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with mode(), saved_tensors_hooks(pack, lambda tensor: tensor):
        logit_BT = model(x)  # alive until all is counted, so that no memory is used twice
    del logit_BT
    return sum(sizes.values())


def time_model(name: str, tasks: int, mode: Mode, rounds: int) -> dict[str, Any]:
    """Seconds of ours, plain and floor by round, and bytes."""
    torch.manual_seed(0)
    fields = FUSIONS[name.removesuffix("_sp")].fields
    sizes = Sizes(tasks, rows=FIELD_ROWS) if fields else Sizes(tasks)
    ours, plain = (model.to(mode.device) for model in build(name, sizes))
    x, probe_BT = inputs(name, sizes, device=mode.device)
    found = {"model": name, "tasks": tasks, "rows": sizes.rows, **mode._asdict()}
    found |= {"ours_bytes": kept_bytes(ours, x, mode), "plain_bytes": kept_bytes(plain, x, mode)}
    dtype = torch.bfloat16 if mode.precision == "bf16" else torch.float32
    with mode():
        bare = floor(CASES[name](sizes)[1], dtype, mode.device)
    run_ours, run_plain = ((torch.compile(m) if mode.compiled else m) for m in (ours, plain))
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: step(run_ours, x, probe_BT, mode),
        "plain": lambda: step(run_plain, x, probe_BT, mode),
        "floor": bare,
    }
    enough = 0.02 if mode.device == "cuda" else 0.1
    times = {}
    for which, run in contenders.items():
        run()
        times[which] = max(1, round(enough / seconds(run, 1, mode.device)))
    found["seconds"] = []
    for number in range(rounds):
        order = list(contenders)[number % 3 :] + list(contenders)[: number % 3]
        taken = {which: seconds(contenders[which], times[which], mode.device) for which in order}
        found["seconds"].append({which: taken[which] for which in contenders})
    return found


def line(found: dict[str, Any]) -> list[Any]:
    """One of the table's."""
    taken = found["seconds"]
    return [
        found["model"], found["tasks"], found["rows"],
        found["precision"] + (", compiled" if found["compiled"] else ""),
        statistics.median(t["ours"] for t in taken) * 1e3,
        statistics.median(t["plain"] / t["ours"] for t in taken),
        statistics.median(t["ours"] / t["floor"] for t in taken),
        found["ours_bytes"] / 2**20, found["plain_bytes"] / 2**20,
    ]  # fmt: skip


HEADERS = ["model", "T", "rows", "numbers", "ms", "plain / ours", "ours / floor", "MiB kept", "by plain"]
FORMATS = ("", "", "", "", ".1f", ".2f", ".2f", ",.0f", ",.0f")


def report(results: list[dict[str, Any]], device: str, keep: bool) -> None:
    """Prints the table; keeps it under results/ if all models are in it."""
    print(tabulate([line(found) for found in results], HEADERS, floatfmt=FORMATS))
    if not keep:
        return
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu}
    machine |= {"python": platform.python_version(), "torch": torch.__version__}
    label = "cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    path = Path(__file__).parent / "results" / f"towers-{label}.json"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def profile(name: str, tasks: int, mode: Mode) -> None:
    """Prints where the time of ours goes: by kind of operator, and the operators that take most."""
    from torch.profiler import ProfilerActivity

    torch.manual_seed(0)
    sizes = Sizes(tasks, rows=FIELD_ROWS) if FUSIONS[name.removesuffix("_sp")].fields else Sizes(tasks)
    ours = build(name, sizes)[0].to(mode.device)
    x, probe_BT = inputs(name, sizes, device=mode.device)
    model = torch.compile(ours) if mode.compiled else ours
    for _ in range(2):
        step(model, x, probe_BT, mode)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if mode.device == "cuda" else [])]
    steps = 3
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step(model, x, probe_BT, mode)
    attribute = "self_device_time_total" if mode.device == "cuda" else "self_cpu_time_total"
    ours_only = torch.autograd.DeviceType.CPU  # operators, not the kernels that they start

    def table(by_shape: bool) -> list[list[Any]]:
        events = profiler.key_averages(group_by_input_shape=by_shape)
        return [
            [e.key.removeprefix("aten::"), getattr(e, attribute) / 1e3 / steps, e.count / steps, str(e.input_shapes)]
            for e in events if e.device_type == ours_only and getattr(e, attribute)
        ]  # fmt: skip

    operators = table(by_shape=False)
    total = sum(ms for _, ms, _, _ in operators)
    kinds: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in [*KINDS, "rest"]}
    for key, ms, calls, _ in operators:
        words = key.lower().strip("_")
        found = [
            k for k, parts in KINDS.items() if any(part in words for part in parts.split()) and "Backward" not in key
        ]
        kinds[found[0] if found else "rest"][0] += ms
        kinds[found[0] if found else "rest"][1] += calls
    print(
        f"\n{name}, T = {tasks}, {mode.precision}{', compiled' if mode.compiled else ''}, {sizes.rows} rows: {total:.1f} ms"
    )
    rows = [[kind, ms, ms / total, calls] for kind, (ms, calls) in kinds.items()]
    print(tabulate(rows, ["kind", "ms", "share", "calls"], floatfmt=("", ".1f", ".1%", ".0f")))
    top = sorted(table(by_shape=True), key=lambda row: -row[1])[:14]
    print(tabulate(top, ["operator", "ms", "calls", "shapes"], floatfmt=("", ".1f", ".0f", "")), flush=True)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Checks, times, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES), metavar="MODEL")
    parser.add_argument("--tasks", nargs="+", type=int, default=TASKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: both where there is a GPU")
    parser.add_argument("--bf16", action="store_true", help="on CPU; a GPU always runs fp32, tf32 and bf16")
    parser.add_argument("--compile", action="store_true", help="on CPU; a GPU always runs eager and compiled")
    parser.add_argument("--profile", nargs="+", choices=list(CASES), metavar="MODEL", help="instead of the table")
    options = parser.parse_args()
    tune_malloc()
    devices = [options.device] if options.device else ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    for name in options.profile or options.models:
        check(name)
    for device in devices:
        cuda = device == "cuda"
        precisions = ["fp32", *(["tf32"] if cuda else []), *(["bf16"] if cuda or options.bf16 else [])]
        modes = [Mode(device, *how) for how in product(precisions, [False, True][: 1 + (cuda or options.compile)])]
        if options.profile:
            for name, tasks, mode in product(options.profile, options.tasks, modes):
                profile(name, tasks, mode)
            continue
        results = []
        for name, tasks, mode in product(options.models, options.tasks, modes):
            torch.compiler.reset()
            results.append(time_model(name, tasks, mode, options.rounds))
            print(tabulate([line(results[-1])], floatfmt=FORMATS, tablefmt="plain"), file=sys.stderr, flush=True)
        report(results, device, options.models == list(CASES))


if __name__ == "__main__":
    main()
