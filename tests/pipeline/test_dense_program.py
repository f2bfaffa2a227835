"""Dense programs: equal to their ranker, the same bytes twice, and nothing in their file is executed."""

# Shapes: B rows, T tasks, E width of all embeddings, D dense columns.

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hostile_pickle import Payload
from small_architecture import small_supernet
from torch import Tensor
from torchrec import KeyedJaggedTensor

from features.batch import Batch
from features.errors import UserError
from features.fit.label_scale import LabelScale
from features.schema.schema import Schema
from models.emm import build_ranker
from models.ranker import ModelConfig, Ranker
from models.torch_compat import onednn_kernel
from pipeline.release.export import lowering
from pipeline.release.export.program import exported, with_rows, write_program
from pipeline.serving import graph, operators
from pipeline.serving.archive import DTYPES, SCHEMA_MAJOR
from pipeline.serving.manifest import DENSE, Lookup, Manifest, Model, StoredFile, StoredTable
from pipeline.serving.program import load_program
from pipeline.storage.files import sha256

MODELS = Path(__file__).parents[2] / "jobs/conf/model"
SCHEMA = yaml.safe_load("""
source: {files: "*.csv", types: {click: int, buy: int, spent: float, stay: float}}
tables: {item: {dim: 4, hash: 11}}
dense: {age: {missing_flag: true}, price: {piecewise: 2}}
categorical: {user: {dim: 4, hash: 7}, shown: {table: item}}
bag: {met: {table: item, max_length: 3}}
tasks:
  click: {kind: binary, label: click}
  buy: {kind: binary, label: buy, given: click}
  stay: {kind: regression, label: stay, transform: log1p}
  spent: {kind: regression, label: spent, loss: {name: ziln}}
split: {by: row_index, modulo: 10, train: [0, 1, 2, 3, 4, 5, 6, 7], valid: [8], test: [9]}
""")
SEQUENCES = SCHEMA | {"bag": {"met": {"table": "item", "max_length": 3, "pooling": "sequence"}}}
ENCODERS = SimpleNamespace(
    edges={"price": [-1.0, 0.0, 1.0]},
    labels={"stay": LabelScale(1.5, 0.5), "spent": LabelScale(0.5, 0.3, positive=0.2)},
    num_embeddings={"item": 11, "user": 7}.__getitem__,
)
TASKS = {name: task["kind"] for name, task in SCHEMA["tasks"].items()}
TWO_TASKS = SCHEMA | {"tasks": {name: SCHEMA["tasks"][name] for name in ("click", "buy")}}
CHAIN = {"fusion": {"name": "single_task", "widths": [8]}, "tower": [5]}
SOURCES = [{"run": task, "step": 1, "task": task, "model": CHAIN} for task in TWO_TASKS["tasks"]]
UNLIKE_TOWERS = {"click": [4], "buy": [], "stay": [3], "spent": [2]}
# Between them every kind of input, output and operator; what other fusions call is among it, or refused when it is exported.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtrn": (SEQUENCES, {"calibration": "monotone"}),
    "autotask": (SCHEMA, {"fusion": {"name": "autotask", "width": 16, "task_id": "embedding", "examples": "mixed"}}),
    "multitab": (SCHEMA, {"fusion": {"name": "multitab", "rows": "alone", "layers": 1}}),
    "stem": (SCHEMA, {}),
    "automtl_supernet": (SCHEMA, {"fusion": small_supernet() | {"experts": 2, "depth": 1}, "tower": UNLIKE_TOWERS}),
    "emm": (TWO_TASKS, {"fusion": {"name": "emm", "sources": SOURCES}}),
}


def ranker_of(schema: dict[str, Any], config: dict[str, Any]) -> Ranker:
    model = build_ranker(Schema.parse(schema, "small.yaml"), ENCODERS, ModelConfig.model_validate(config), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and from gates that start at exactly 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(rows: int = 12) -> Batch:
    ids = {"user": [[r % 7] for r in range(rows)], "shown": [[r % 11] for r in range(rows)]}
    ids["met"] = [[*range(r % 4)] for r in range(rows)]
    sparse = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([i for found in ids.values() for row in found for i in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for found in ids.values() for row in found]),
    )
    one_BT = torch.ones(rows, 4)
    return Batch(sparse, torch.randn(rows, 3), one_BT, one_BT.bool(), one_BT, torch.arange(rows))


def manifest_of(folder: Path, width: int = 12, **further: Any) -> Manifest:
    """Of a package of one table of a width, with the files that lie in the folder."""
    files = {
        file.name: StoredFile(bytes=file.stat().st_size, sha256=sha256(file))
        for file in folder.iterdir()
        if file.is_file()
    }
    return Manifest(
        model=Model(run="r", step=1, checkpoint="", fingerprint="", encoders=""),
        tables={"all": StoredTable(file="tables/all.bin", first=0, rows=1, dim=width, num_embeddings=1)},
        lookups=[Lookup(feature="user", table="all", pooling="single")],
        **{"tasks": TASKS, "versions": {}, "format": "fp32", "dense_width": 3, "files": files} | further,
    )


def program_of(model: Ranker, folder: Path, schema: dict[str, Any] = SCHEMA) -> Callable[[Tensor, Tensor], Tensor]:
    width = model.embedded(batch()).shape[1]
    assert write_program(model, width, 3, folder, compiled=False) == [DENSE]
    tasks = {name: task["kind"] for name, task in schema["tasks"].items()}
    return load_program(folder, manifest_of(folder, width, tasks=tasks))


@pytest.mark.parametrize("name", CASES)
def test_a_program_equals_its_ranker_for_any_number_of_rows(name, tmp_path):
    schema, config = CASES[name]
    if "fusion" not in config:
        config = yaml.safe_load((MODELS / f"{name}.yaml").read_text()) | config
    model = ranker_of(schema, config)
    program = program_of(model, tmp_path, schema)
    for rows in (1, 2, 37, 512):
        given = batch(rows)
        with torch.no_grad():
            embedding_BE, wanted_BT = model.embedded(given), model(given)
        found_BT = program(embedding_BE, given.dense_BD)
        torch.testing.assert_close(found_BT, wanted_BT, rtol=2e-6, atol=2e-6)
        assert not found_BT.requires_grad
    assert program(embedding_BE[:0], given.dense_BD[:0]).shape == (0, wanted_BT.shape[1])


# One written program for all below


@pytest.fixture(scope="module")
def model() -> Ranker:
    torch.manual_seed(0)
    return ranker_of(SCHEMA, {"fusion": {"name": "shared_bottom", "widths": [8]}, "tower": [4]})


@pytest.fixture(scope="module")
def written(model: Ranker, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("program")
    program_of(model, folder)
    return (folder / DENSE).read_bytes()


@pytest.fixture(scope="module")
def program(written: bytes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, Tensor], Tensor]:
    folder = tmp_path_factory.mktemp("loaded")
    (folder / DENSE).write_bytes(written)
    return load_program(folder, manifest_of(folder))


def test_a_program_is_the_same_bytes_twice_and_torch_reads_it_too(model, written, tmp_path):
    torch.manual_seed(5)  # example inputs must not be drawn
    program = program_of(model, tmp_path)
    assert (tmp_path / DENSE).read_bytes() == written
    assert str(Path(__file__).parents[2]).encode() not in written
    given = model.embedded(batch(5)), batch(5).dense_BD
    torchs = torch.export.load(io.BytesIO(written)).module()
    torch.testing.assert_close(program(*given), torchs(*given), rtol=1e-6, atol=1e-6)


def test_inputs_of_other_sizes_are_refused_before_any_code_reads_them(program):
    for embedding, dense in (((2, 11), (2, 3)), ((2, 12), (2, 4)), ((2, 12), (3, 3)), ((12,), (3,))):
        with pytest.raises(ValueError, match="not float32 of"):
            program(torch.zeros(embedding), torch.zeros(dense))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        program(torch.zeros(2, 12), torch.zeros(2, 3).double())


def test_threads_may_call_a_program_at_once(model, program):
    given = [(model.embedded(batch(rows)), batch(rows).dense_BD) for rows in range(1, 60)]
    wanted = [program(*each) for each in given]
    with ThreadPoolExecutor(8) as threads:
        for found_BT, wanted_BT in zip(threads.map(lambda each: program(*each), given * 3), wanted * 3, strict=True):
            assert torch.equal(found_BT, wanted_BT)


# Attacks

GRAPH, WEIGHTS = "dense/models/model.json", "dense/data/weights/model_weights_config.json"
CONSTANTS, SAMPLES = "dense/data/constants/model_constants_config.json", "dense/data/sample_inputs/model.pt"
Members = dict[str, bytes]


def changed(member: str, change: Callable[[Any], None]) -> Callable[[Members, Path], None]:
    def apply(members: Members, marker: Path) -> None:
        content = json.loads(members[member].decode().replace("MARKER", str(marker)))
        change(content)
        members[member] = json.dumps(content).replace("MARKER", str(marker)).encode()

    return apply


def pickled_samples(members: Members, marker: Path) -> None:
    members[SAMPLES] = pickle.dumps(Payload(marker))


def pickled_weight(members: Members, marker: Path) -> None:
    content = json.loads(members[WEIGHTS])
    payload = next(iter(content["config"].values()))
    payload["use_pickle"] = True
    members[f"dense/data/weights/{payload['path_name']}"] = pickle.dumps(Payload(marker))
    members[WEIGHTS] = json.dumps(content).encode()


def pickled_legacy_weights(members: Members, marker: Path) -> None:
    members["dense/data/weights/model.pt"] = pickle.dumps(Payload(marker))


def custom_object(members: Members, marker: Path) -> None:
    content = json.loads(members[CONSTANTS])
    content["config"]["extra"] = {
        "path_name": "custom_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    members[CONSTANTS] = json.dumps(content).encode()
    members["dense/data/constants/custom_obj_0"] = pickle.dumps(Payload(marker))


def opaque_object(members: Members, marker: Path) -> None:
    custom_object(members, marker)
    members["dense/data/constants/opaque_obj_0"] = members.pop("dense/data/constants/custom_obj_0")


def library(members: Members, _: Path) -> None:
    members["dense/data/aotinductor/model/model.so"] = b"\x7fELF"


def node(graph: Any) -> Any:
    return graph["graph_module"]["graph"]["nodes"][0]


def operator(target: str) -> Callable[[Members, Path], None]:
    return changed(GRAPH, lambda graph: node(graph).update(target=target))


def reads_a_file(graph: Any) -> None:
    arguments = [("filename", {"as_string": "MARKER"}), ("shared", {"as_bool": True}), ("size", {"as_int": 8})]
    inputs = [{"name": name, "arg": arg, "kind": 1} for name, arg in arguments]
    node(graph).update(target="torch.ops.aten.from_file.default", inputs=inputs)


def calls(graph: Any, name: str, target: str, *arguments: Any, keywords: Any = ()) -> None:
    inputs = [{"name": "x", "arg": argument, "kind": 1} for argument in arguments]
    inputs += [{"name": key, "arg": argument, "kind": 2} for key, argument in keywords]
    made = {"target": f"torch.ops.aten.{target}", "inputs": inputs, "outputs": [{"as_tensor": {"name": name}}]}
    graph["graph_module"]["graph"]["nodes"].insert(len(name) - 1, made | {"metadata": {}})


def grows(size: int) -> Callable[[Any], None]:
    return lambda graph: calls(graph, "v", "zeros.default", {"as_ints": [size]})


def repeats(graph: Any) -> None:  # the input's rows
    (given,) = (s["user_input"]["arg"] for s in graph["graph_module"]["signature"]["input_specs"][-1:])
    calls(graph, "v", "repeat.default", given, {"as_ints": [1 << 10, 1 << 20]})


def multiplies(graph: Any) -> None:  # two vectors of constants
    size = {"as_ints": [1 << 9, 1]}
    calls(graph, "v", "zeros.default", size)
    calls(graph, "vv", "view.default", {"as_tensor": {"name": "v"}}, {"as_ints": [1, 1 << 9]})
    calls(graph, "vvv", "mul.Tensor", *({"as_tensor": {"name": name}} for name in ("v", "vv")))


def vast_weight(members: Members, _: Path) -> None:
    content = json.loads(members[WEIGHTS])
    for payload in content["config"].values():
        payload["tensor_meta"]["sizes"] = [{"as_int": 1 << 52}, {"as_int": 1 << 52}]
    members[WEIGHTS] = json.dumps(content).encode()


def reads_nothing(graph: Any) -> None:
    node(graph)["inputs"][0]["arg"] = {"as_tensor": {"name": "no"}}


def short_weight(members: Members, _: Path) -> None:
    members["dense/data/weights/weight_0"] = members["dense/data/weights/weight_0"][:-4]


ATTACKS: dict[str, Callable[[Members, Path], None]] = {
    "a pickle of sample inputs": pickled_samples,
    "a pickled weight": pickled_weight,
    "pickled legacy weights": pickled_legacy_weights,
    "a custom object": custom_object,
    "an opaque object": opaque_object,
    "a library": library,
    "an operator of another library": operator("torch.ops.profiler._record_function_enter_new.default"),
    "a Python function": operator("os.system"),
    "an operator that writes": operator("torch.ops.aten.add_.Tensor"),
    "a name that leads elsewhere": operator("torch.ops.aten.__class__.__base__"),
    "an operator that opens a file": changed(GRAPH, reads_a_file),
    "a tensor beyond all memory": changed(GRAPH, grows(1 << 50)),
    "a tensor that would fit into memory": changed(GRAPH, grows(1 << 29)),
    "rows that are repeated": changed(GRAPH, repeats),
    "products of constants": changed(GRAPH, multiplies),
    "a weight of more numbers than 64 bits count": vast_weight,
    "a weight cut short": short_weight,
    "a value that is not there": changed(GRAPH, reads_nothing),
    "a later version": changed(GRAPH, lambda graph: graph["schema_version"].update(major=SCHEMA_MAJOR + 1)),
    "no graph": lambda members, _: members.update({GRAPH: b"{}"}),
    "a deep graph": lambda members, _: members.update({GRAPH: b"[" * 100_000}),
}  # fmt: skip


TOO_LARGE = [*ATTACKS][[*ATTACKS].index("a tensor beyond all memory") :][:4]


def archive(members: Members, compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        for name, member in members.items():
            file.writestr(zipfile.ZipInfo(name), member, compression)
    return content.getvalue()


def members_of(content: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def refused(folder: Path, content: bytes) -> str:
    """The message of a program that is not loaded though its checksum is the manifest's."""
    (folder / DENSE).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_program(folder, manifest_of(folder))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{folder / DENSE}: ")
    return str(caught.value)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_of_a_program_is_executed(attack, written, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "MAX_MADE", 1 << 17)
    folder, marker = tmp_path / "package", tmp_path / "marker"
    folder.mkdir()
    members = members_of(written)
    ATTACKS[attack](members, marker)
    message = refused(folder, archive(members))
    assert ("a tensor of" in message) == (attack in TOO_LARGE), message
    assert not marker.exists()


def test_expressions_and_guards_of_a_program_are_not_evaluated(written, tmp_path):
    folder, marker = tmp_path / "package", tmp_path / "marker"
    folder.mkdir()
    members, code = members_of(written), f"__import__('pathlib').Path({str(marker)!r}).touch()"
    graph = json.loads(members[GRAPH])
    graph["guards_code"] = [code]
    graph["range_constraints"] = {code: {"min_val": 1, "max_val": 9}}
    for meta in graph["graph_module"]["graph"]["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code
    members[GRAPH] = json.dumps(graph).encode()
    (folder / DENSE).write_bytes(archive(members))
    program = load_program(folder, manifest_of(folder))
    assert program(torch.zeros(3, 12), torch.zeros(3, 3)).shape == (3, 4)
    assert not marker.exists()


def test_archives_that_are_damaged_compressed_or_not_the_manifests_are_refused(written, tmp_path):
    refused(tmp_path, archive(members_of(written), zipfile.ZIP_DEFLATED))
    for size in (0, 1, len(written) // 2, len(written) - 1):
        refused(tmp_path, written[:size])
    (tmp_path / DENSE).write_bytes(written)
    manifest = manifest_of(tmp_path)
    (tmp_path / DENSE).write_bytes(written[:-1] + b"!")
    with pytest.raises(UserError, match="its checksum is not the manifest's"):
        load_program(tmp_path, manifest)


def test_a_compiled_program_of_another_torch_or_processor_is_refused(written, tmp_path):
    (tmp_path / DENSE).write_bytes(written)
    with pytest.raises(UserError, match=r"no compiled program\. Run jobs.export with target=aot"):
        load_program(tmp_path, manifest_of(tmp_path), compiled=True)
    (tmp_path / "compiled.pt2").write_bytes(b"never read")
    manifest = manifest_of(tmp_path, compiled=True).model_copy(update={"versions": {"torch": "1.0", "cpu": "AVX2"}})
    with pytest.raises(UserError, match=r"compiled for torch 1\.0, and here is"):
        load_program(tmp_path, manifest, compiled=True)


def test_a_missing_compiler_is_an_error_of_target_aot_alone(model, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"target=aot: no C\+\+ compiler no-such-compiler here"):
        write_program(model, 12, 3, tmp_path, compiled=True)
    assert not [*tmp_path.iterdir()]


def test_what_is_read_of_torchs_format_is_as_torch_has_it():
    from torch._export.serde import schema, serialize

    assert schema.SCHEMA_VERSION[0] == SCHEMA_MAJOR
    assert {int(kind): dtype for kind, dtype in serialize._SERIALIZE_TO_TORCH_DTYPE.items() if kind in DTYPES} == DTYPES
    assert {"run"} <= {*dir(torch._C._aoti.AOTIModelPackageLoader)}
    for name in operators.ALLOWED | operators.PASSED_ON | operators.LEFT_OUT:
        packet, overload = name.split(".")
        found = getattr(getattr(torch.ops.aten, packet), overload)
        assert name in operators.PASSED_ON or not found._schema.is_mutable, name


@pytest.mark.parametrize("name", ["adatt", "home", "multitab"])
def test_what_is_compiled_gives_the_same_numbers_without_products_by_row_or_with_weights(name, monkeypatch):
    monkeypatch.setattr(lowering, "LARGE", 1)
    schema, config = CASES.get(name, (SCHEMA, {}))
    config = config if "fusion" in config else yaml.safe_load((MODELS / f"{name}.yaml").read_text()) | config
    model = ranker_of(schema, config)
    given = batch(20)
    with torch.no_grad():
        embedding_BE, wanted_BT = model.embedded(given), model(given)
    program = exported(model, embedding_BE.shape[1], 3)
    lowered = with_rows(lowering.Lowered(program), embedding_BE.shape[1], 3)
    with torch.no_grad():
        found_BT = lowered.module()(embedding_BE, given.dense_BD)
    torch.testing.assert_close(found_BT, wanted_BT, rtol=1e-5, atol=1e-6)

    def count(of: torch.export.ExportedProgram, *operators: Any) -> int:
        return sum(node.target in operators for node in of.graph.nodes)

    products = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
    assert count(program, *products, torch.ops.aten.linear.default) > 5
    assert count(lowered, *products, torch.ops.aten.linear.default) == 0
    assert count(lowered, onednn_kernel().default) > 5
