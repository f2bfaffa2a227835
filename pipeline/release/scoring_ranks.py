"""Scoring on several ranks of this machine (`ranks=8` of jobs.nightly), with the tables sharded over them."""

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from features.errors import OtherRankError, Preempted, UserError
from models.table_storage import Precision
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.metrics import evaluated as figures
from pipeline.evaluation.metrics.evaluated import Evaluated
from pipeline.evaluation.metrics.settings import MeasureConfig
from pipeline.evaluation.weights import Loading, Tables
from pipeline.processes import end_with
from pipeline.release.child import run_module
from pipeline.release.night import ModelReference, Strict
from pipeline.release.scoring import counted, results
from pipeline.storage.files import make_folder, write_json, write_text
from pipeline.storage.store_path import on_store, place
from pipeline.terminal import escape_output
from pipeline.training.parallel import process_group
from pipeline.training.parallel.scoring import shard_for_scoring

LOG = "score.log"
FOLDER = "scoring"  # of a night, while ranks are at work
WORK, FIGURES, RECORD = "work.json", "figures.parquet", "record.json"


class Work(Strict):
    """What is scored, and how."""

    model: ModelReference
    day: str
    batch_size: int
    measure: MeasureConfig
    tables: Tables
    precision: Precision


def check_ranks(ranks: int) -> None:
    """Raises UserError for more ranks than GPUs."""
    if 0 < (gpus := torch.cuda.device_count()) < ranks:
        raise UserError(f"ranks={ranks}: each takes a GPU, and this machine has {gpus}")


def score_on_ranks(work: Work, ranks: int, night: Path) -> tuple[Evaluated, dict[str, Any]]:
    """As `scoring.score`, by so many processes that jobs.launch starts; their output is in score.log of the night.

    Raises:
        UserError: as a rank has raised it, or where one was lost.
        Preempted: they were asked to end.
    """
    with _folder(night) as folder:
        return _scored(work, ranks, night, folder)


@contextmanager
def _folder(night: Path) -> Iterator[Path]:
    """A new folder of this machine, for what ranks are given and give; of a night on a store a temporary one."""
    if on_store(night):
        with tempfile.TemporaryDirectory(prefix="taskfuse-") as temporary:
            yield Path(temporary)
        return
    folder = night / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    yield make_folder(folder)
    shutil.rmtree(folder)


def _scored(work: Work, ranks: int, night: Path, folder: Path) -> tuple[Evaluated, dict[str, Any]]:
    write_text(folder / WORK, work.model_dump_json())
    code = run_module(__name__, [str(folder.absolute())], ranks, night / LOG)
    if code == os.EX_TEMPFAIL:
        raise Preempted(f"{work.model}: the ranks that score it were asked to end. Run the same command again.")
    if errors := sorted(folder.glob("error-*")):
        raise UserError(errors[0].read_text())
    if code:
        raise UserError(f"{work.model}: its scoring on {ranks} ranks ended with exit code {code}: see {night / LOG}")
    return figures.read(folder / FIGURES), json.loads((folder / RECORD).read_text())


def main() -> None:
    """What each rank does: rank 0 writes the figures and the record; any rank its error, but for that another one failed."""
    escape_output()
    end_with(os.getppid(), ctypes.CDLL(None))  # of jobs.launch, should it be killed
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    try:
        work = Work.model_validate_json((folder / WORK).read_text())
        loading = Loading(work.tables, work.precision, shard_for_scoring)
        day = Dataset(place(work.day))
        with process_group.joined():
            found = counted(work.model, day, work.batch_size, work.measure, loading)
        if rank == 0:
            evaluated, record = results(found, day)
            figures.write(evaluated, folder / FIGURES)
            write_json(folder / RECORD, record)
    except UserError as error:
        if not isinstance(error, OtherRankError):
            write_text(folder / f"error-{rank}", str(error))
        sys.exit(f"error (rank {rank}): {error}")


if __name__ == "__main__":
    main()
