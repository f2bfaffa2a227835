"""The archive of a dense program: the graph and the tensors that torch.export wrote, read as data.

torch.export.load is made for files that one trusts: it unpickles sample inputs, weights and objects where the file asks for it,
evaluates expressions and guards as Python, and calls any operator. Here nothing of this is read: members are JSON and raw
numbers, uncompressed, and whatever else is in the file is refused.
"""

import io
import math
import re
import zipfile
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from features.errors import UserError
from features.plain_json import Count, parse_json, validated

ROOT, MODEL = "dense", "model"  # names inside the archive
MEMBERS = re.compile(
    rf"{ROOT}/(data/weights/weight_\d{{1,6}}|data/constants/tensor_\d{{1,6}}|data/weights/{MODEL}_weights_config\.json"
    rf"|data/constants/{MODEL}_constants_config\.json|models/{MODEL}\.json|data/sample_inputs/{MODEL}\.pt|archive_format"
    r"|archive_version|byteorder|\.data/version)"
)
MAX_MEMBERS = 100_000
SAMPLE_INPUTS = f"{ROOT}/data/sample_inputs/{MODEL}.pt"
# torch._export.serde.schema.ScalarType
DTYPES = {
    1: torch.uint8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64,
    12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip

Name = Annotated[str, Field(max_length=1000)]
Argument = dict[Name, Any]  # one entry, its kind: checked by pipeline.serving.program
Model = TypeVar("Model", bound=BaseModel)


class Part(BaseModel):
    """Of torch's records only what a program needs; other keys are not read."""

    model_config = ConfigDict(extra="ignore")


class TensorName(Part):
    """A tensor of the graph."""

    name: Name


class NamedArgument(Part):
    """An argument of an operator."""

    name: Name
    arg: Argument
    kind: int | None = None


class Node(Part):
    """A call of an operator."""

    target: Name
    inputs: Annotated[list[NamedArgument], Field(max_length=1000)]
    outputs: list[Argument]


class Size(Part):
    """A size, None where it is not a number."""

    as_int: Count | None = None


class Meta(Part):
    """Form of a tensor."""

    dtype: int
    sizes: Annotated[list[Size], Field(max_length=16)]
    strides: list[Size]
    storage_offset: Size


class Graph(Part):
    """Calls, in order."""

    inputs: list[Argument]
    outputs: list[Argument]
    nodes: Annotated[list[Node], Field(max_length=100_000)]


class Parameter(Part):
    """An input that is a parameter, buffer or constant."""

    arg: TensorName
    parameter_name: Name | None = None
    buffer_name: Name | None = None
    tensor_constant_name: Name | None = None

    @property
    def source(self) -> str:
        """The tensor's name among the stored ones."""
        return self.parameter_name or self.buffer_name or self.tensor_constant_name or ""


class UserInput(Part):
    """An input of the caller."""

    arg: Argument


class InputSpec(BaseModel):
    """What an input of the graph is: one of these."""

    model_config = ConfigDict(extra="forbid")
    parameter: Parameter | None = None
    buffer: Parameter | None = None
    tensor_constant: Parameter | None = None
    user_input: UserInput | None = None


class Signature(Part):
    """Inputs, in order."""

    input_specs: list[InputSpec]


class GraphModule(Part):
    """The graph with its signature."""

    graph: Graph
    signature: Signature


class SchemaVersion(Part):
    """Of torch's format."""

    major: int


class Program(Part):
    """models/model.json."""

    graph_module: GraphModule
    schema_version: SchemaVersion


class Payload(Part):
    """Where the bytes of a tensor are."""

    path_name: Name
    use_pickle: bool
    tensor_meta: Meta | None = None


class Payloads(Part):
    """data/weights/model_weights_config.json, and that of constants."""

    config: dict[Name, Payload]


SCHEMA_MAJOR = 8


def read_archive(content: bytes, where: object) -> tuple[GraphModule, dict[str, Tensor]]:
    """The graph, and the tensors that it names.

    Args:
        where: the file, for errors.
    Raises:
        UserError: anything but a graph and raw tensors, as pipeline.release.export.program writes them.
    """
    members = _members(content, where)
    program = _parsed(Program, members, f"{ROOT}/models/{MODEL}.json", where)
    if (major := program.schema_version.major) != SCHEMA_MAJOR:
        raise damaged(where, f"a program of version {major}, not {SCHEMA_MAJOR}")
    tensors: dict[str, Tensor] = {}
    for folder, name in (("weights", "weights"), ("constants", "constants")):
        payloads = _parsed(Payloads, members, f"{ROOT}/data/{folder}/{MODEL}_{name}_config.json", where)
        for tensor, payload in payloads.config.items():
            tensors[tensor] = _tensor(members, f"{ROOT}/data/{folder}/", tensor, payload, where)
    return program.graph_module, tensors


def damaged(where: object, what: str) -> UserError:
    """The error of a program that is not as it was written."""
    return UserError(f"{where}: {what}: no program that jobs.export wrote. Run jobs.export again.")


def _members(content: bytes, where: object) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(entries) > MAX_MEMBERS or len({*names}) < len(names):
                raise damaged(where, "too many members")
            if unknown := [name for name in names if not MEMBERS.fullmatch(name)]:
                raise damaged(where, f"member {unknown[0][:100]!r}")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            # Members may overlap: stored ones that do not are never more than the file.
            if not stored or sum(entry.file_size for entry in entries) > len(content):
                raise damaged(where, "compressed members")
            members = {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise damaged(where, f"no archive ({error})") from None
    if members.get(SAMPLE_INPUTS):
        raise damaged(where, "a pickle of sample inputs")
    return members


def _parsed(model: type[Model], members: dict[str, bytes], name: str, where: object) -> Model:
    if (content := members.get(name)) is None:
        raise damaged(where, f"{name} is missing")
    return validated(model, parse_json(content, f"{where}: {name}"), f"{where}: {name}")


def _tensor(members: dict[str, bytes], folder: str, name: str, payload: Payload, where: object) -> Tensor:
    content, meta = members.get(folder + payload.path_name), payload.tensor_meta
    if payload.use_pickle or meta is None:
        raise damaged(where, f"a pickle in the place of {name[:100]}")
    sizes, dtype = [size.as_int for size in meta.sizes], DTYPES.get(meta.dtype)
    if content is None or dtype is None or None in sizes or meta.storage_offset.as_int != 0:
        raise damaged(where, f"tensor {name[:100]}")
    shape = [size for size in sizes if size is not None]
    if math.prod(shape) * dtype.itemsize != len(content):  # before torch makes one of so many numbers
        raise damaged(where, f"tensor {name[:100]} of {len(content)} bytes")
    empty = torch.empty(shape, dtype=dtype, device="meta")
    if [s.as_int for s in meta.strides] != [*empty.stride()]:
        raise damaged(where, f"the strides of tensor {name[:100]}")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
