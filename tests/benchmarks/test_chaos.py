"""A run through faults in each phase of a checkpoint, and that the comparison with an undisturbed one sees what it should."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import disturbed
from chaos_judge import STEPS, Outcome, judge
from tiny_training import make_dataset

pytestmark = pytest.mark.system


def fault(phase: str, step: int, rank: int, *acts: str, call: int = 0) -> dict[str, object]:
    return {"phase": phase, "step": step, "rank": rank, "acts": acts, "call": call}


FAULTS = [
    fault("writing", 6, 0, "tear line", "kill all", call=4),
    fault("committed", 14, 0, "leave staging", "flip bit", "kill all"),
    fault("step", 22, 1, "TERM launcher"),
    fault("writing", 22, 1, "remove manifest", "kill all", call=1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    make_dataset(folder / "data")
    return folder


def test_a_run_that_is_killed_while_it_writes_commits_and_ends_is_that_of_an_undisturbed_one_bit_for_bit(
    folder: Path,
) -> None:
    outcome = disturbed(folder, "run", [2], FAULTS, random.Random(0))
    print(outcome.log)
    assert outcome.wrong == []
    assert outcome.faults["kill all"] == 3
    assert outcome.faults["TERM launcher"] == 1
    assert outcome.starts >= 4
    assert outcome.again > 0
    for spoil, sign in SPOILT.items():
        copy = folder / spoil.__name__
        shutil.copytree(folder / "run", copy)
        shutil.copytree(folder / "run.seen", folder / f"{copy.name}.seen")
        spoil(copy)
        found = Outcome(copy.name)
        judge(folder, found, [2])
        assert [line for line in found.wrong if line.startswith(sign)], (copy.name, found.wrong)


def another_weight(run: Path) -> None:
    """Of the last checkpoint, with a checksum that fits."""
    from pipeline.run import checkpoint

    path = checkpoint.folder(run / "checkpoints", STEPS)
    file = path / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    manifest = checkpoint.read(path)
    files = manifest.files | {file.name: (len(content), checkpoint.manifest.sha256(file))}
    (path / "manifest.json").write_text(manifest.sealed(files).model_dump_json())


def repeated_line(run: Path) -> None:
    file = run / "metrics" / "train.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines(keepends=True)[-1])


def staging(run: Path) -> None:
    (run / "checkpoints" / ".step-00000044").mkdir()


def unfinished(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "training"}))


def missed_row(run: Path) -> None:
    for file in run.with_name(f"{run.name}.seen").glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(x | {"rows": x["rows"][x["step"] == 7 :]}) + "\n" for x in lines))


SPOILT: dict[Callable[[Path], None], str] = {
    another_weight: "tensor ",
    repeated_line: "train.jsonl: lines of steps",
    staging: "checkpoints of steps",
    unfinished: "status: ",
    missed_row: "rows of step 7",
}
