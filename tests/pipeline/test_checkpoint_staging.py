"""State of a GPU on its way into a checkpoint: a pretended GPU, whose copies to pinned memory arrive at once or late."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import MANIFEST
from torch import Tensor
from torch.distributed._shard import sharded_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from pipeline.run import checkpoint
from pipeline.run.checkpoint import staging, writer
from pipeline.torch_compat import Shard, ShardedTensor

pytestmark = pytest.mark.usefixtures("group")
PIECE = 1024


class Gpu:
    """Tensors that are taken for ones of a GPU, by their memory, and what is done with them.

    Args:
        late: copies are made only when their event is waited for.
    Attributes:
        sent: copies under way, and how many there were in all. allocated: bytes of new tensors of
            the main thread, pinned or not.
    """

    def __init__(self, late: bool, patch: pytest.MonkeyPatch) -> None:
        self.late, self.memory, self.sent, self.count = late, set[int](), list[Callable[[], object]](), 0
        self.allocated: list[tuple[int, bool]] = []
        empty, copy, gpu = torch.empty, Tensor.copy_, self

        class Event:
            def record(self, stream: object) -> None:
                self.before = gpu.count

            def synchronize(self) -> None:
                while gpu.count - len(gpu.sent) < self.before:
                    gpu.sent.pop(0)()

        def allocate(*sizes: Any, pin_memory: bool = False, **named: Any) -> Tensor:
            made = empty(*sizes, **named)
            if threading.current_thread() is threading.main_thread():
                self.allocated.append((made.nbytes, pin_memory))
            return made

        def send(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if not non_blocking:
                assert not self.holds(source), "a copy that waits, past the pinned memory"
                return copy(into, source)
            self.count += 1
            self.sent.append(lambda: copy(into, source))
            if not late:
                self.sent.pop()()
            return into

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda _: None)
        patch.setattr(torch, "empty", allocate)
        patch.setattr(Tensor, "copy_", send)
        patch.setattr(staging, "on_gpu", self.holds)
        patch.setattr(staging, "PIECE_BYTES", PIECE)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.memory


def state() -> dict[str, Any]:
    """Every type of numbers and form of tensors that a state has; more than a piece, where it is not small on purpose."""
    plain: dict[str, Any] = {
        "fp32": torch.randn(301, 5),
        "fp16": torch.randn(300, 7).half(),
        "bf16": torch.randn(700, 3).bfloat16(),
        "int64": torch.arange(900),
        "bool": torch.arange(3000) % 3 == 0,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "one row": torch.randn(1, 2, 700),
        "columns": torch.randn(64, 40)[:, ::2],
        "transposed": torch.randn(50, 40).t(),
    }
    shards = [Shard.from_tensor_and_offsets(torch.randn(200, 4), [place, 0], 0) for place in (0, 200)]
    plain["sharded"] = sharded_tensor.init_from_local_shards(shards, [400, 4])
    plain["dtensor"] = DTensor.from_local(torch.randn(100, 8), init_device_mesh("cpu", (1,)), [Replicate()])
    return {"model": plain}


def parts(value: Any) -> list[Tensor]:
    """The tensors with the numbers of one."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value.to_local() if isinstance(value, DTensor) else value]


def all_parts(given: dict[str, Any]) -> list[Tensor]:
    return [part for value in given["model"].values() for part in parts(value)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_a_gpus_state_is_saved_in_pieces_and_as_it_was_whatever_follows(
    tmp_path: Path, background: bool, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, found = state(), state()
    gpu = Gpu(late, monkeypatch)
    gpu.memory = {part.untyped_storage().data_ptr() for part in all_parts(given) if part.numel()}
    saver = writer.CheckpointWriter(tmp_path, None, background, lambda *_: None)
    for step in (1, 2):
        gpu.allocated.clear()
        before = [part.clone() for part in all_parts(given)]
        saver.save(given, MANIFEST.model_copy(update={"step": step}))
        assert gpu.sent == [], "copies under way when training goes on"
        pinned = [size for size, is_pinned in gpu.allocated if is_pinned]
        unpinned = sum(size for size, is_pinned in gpu.allocated if not is_pinned)
        for part in all_parts(given):
            part.zero_()
        assert saver.wait() is None
        checkpoint.load(checkpoint.folder(tmp_path, step), found)
        assert all(map(torch.equal, all_parts(found), before))
        for part, old in zip(all_parts(given), before, strict=True):
            part.copy_(old + 1 if old.dtype != torch.bool else ~old)
        assert pinned == ([PIECE, PIECE] if step == 1 or not background else [])
        if background:  # messages of the ranks are allocated by the other thread
            assert unpinned == (sum(part.nbytes for part in before) if step == 1 else 0)
    assert gpu.count > 2 * len(before)


def test_a_piece_is_sent_while_the_one_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, source = Gpu(True, monkeypatch), torch.randn(1000)
    gpu.memory = {source.data_ptr()}
    under_way = [len(gpu.sent) for _ in staging.Staging().pieces(source)]
    assert under_way == [1, 1, 1, 0]


def test_main_memory_is_read_as_it_is() -> None:
    tensor = torch.randn(30, 4)
    [piece] = staging.Staging().pieces(tensor)
    assert piece.data_ptr() == tensor.data_ptr()


def test_a_copy_that_is_pinned_after_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = state()
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    copy = writer.copy_to_cpu(given, staging.Staging())
    assert all(map(torch.equal, all_parts(copy), all_parts(given)))
