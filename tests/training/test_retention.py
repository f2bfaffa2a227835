"""Which checkpoints stay: against the rule written as a loop; and that nobody loses one that they read."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointManifest
from pipeline.training.config import Keep
from pipeline.training.retention import surplus

FIGURES = st.none() | st.sampled_from([0.5, 0.6, 0.7])


@settings(max_examples=200, deadline=None)
@given(
    st.sets(st.integers(1, 30), min_size=1, max_size=12),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 7),
    st.none() | st.sampled_from(["valid", "test"]),
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["valid", "test"]), FIGURES, FIGURES), max_size=15),
)
def test_what_goes_is_what_no_rule_asks_for(steps, last, every, best, read) -> None:
    records = [
        {"step": step, "split": split, "metrics": {"click": {"ne": ne, "auc": 0.1}, "dwell": {"mse": mse}}}
        for step, split, ne, mse in read
    ]
    ordered = sorted(steps)
    gone = surplus(ordered, Keep(last=last, every=every, best=best), records)
    if last is every is best is None:
        assert gone == []
        return
    stay = []
    for place, step in enumerate(ordered):
        newest = place == len(ordered) - 1
        among_last = last is not None and len(ordered) - place <= last
        multiple = every is not None and step % every == 0
        chosen = False
        if best is not None:
            mine = [record for record in records if record["split"] == best and record["step"] in steps]
            chosen = step not in [record["step"] for record in mine]  # nobody has looked at it yet
            for task, figure in (("click", "ne"), ("dwell", "mse")):
                known = [r for r in mine if r["metrics"][task][figure] is not None]
                if known:
                    lowest = min(r["metrics"][task][figure] for r in known)
                    first = min(r["step"] for r in known if r["metrics"][task][figure] == lowest)
                    chosen = chosen or step == first
        if newest or among_last or multiple or chosen:
            stay.append(step)
    assert gone == [step for step in ordered if step not in stay]


@pytest.fixture
def saved(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    about = {"rows": 1, "epoch": 0, "cursors": [1], "seed": 0, "window": 1, "batch_size": 1, "data": "d"}
    about |= {"fingerprint": "f", "encoders": "e", "config": "c"}
    yield lambda fill: checkpoint.save(tmp_path, {"w": torch.full((50,), fill)}, CheckpointManifest(step=4, **about))
    dist.destroy_process_group()


def test_a_checkpoint_that_is_read_is_not_deleted_until_it_has_been(saved) -> None:
    path = saved(1.0)
    with checkpoint.reading(path), checkpoint.reading(path):
        assert not checkpoint.remove(path)
        checkpoint.check(path)
    assert checkpoint.remove(path)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(UserError, match=r"manifest\.json is missing"), checkpoint.reading(path):
        pass


def test_a_checkpoint_is_replaced_only_once_its_readers_are_done(saved) -> None:
    path = saved(1.0)
    with checkpoint.reading(path):
        writer = threading.Thread(target=saved, args=(2.0,))
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
        state = {"w": torch.zeros(50)}
        checkpoint.load(path, state, alone=True)
        assert state["w"].unique().tolist() == [1.0]
    writer.join()
    checkpoint.load(path, state, alone=True)
    assert state["w"].unique().tolist() == [2.0]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
