"""A run directory: its configuration, schema, checkpoints, metrics and status."""

import hashlib
import json
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from features.errors import UserError
from features.plain_json import first_fault, read_json, validated
from features.regular_files import irregular, lstat_regular, refuse_link, user_error_for_links
from features.schema.schema import Schema
from features.yaml_text import read_yaml, yaml_of
from pipeline.dataset.days import MissingDays
from pipeline.run.outbox import Outbox
from pipeline.storage.base import Lock
from pipeline.storage.files import (
    append_line,
    json_text,
    make_folder,
    read_lines,
    storage_of,
    write_json,
    write_text,
)
from pipeline.storage.store_path import on_store

FOLDERS = ("checkpoints", "evaluations", "metrics", "predictions", "tensorboard")
FILES = ("config.yaml", "schema.yaml", "status.json", "restarts.jsonl", "mlflow.json", "report.html", "ne.png")
MAX_STATUS_BYTES = 1 << 16


class Status(BaseModel):
    """The trainer's heartbeat.

    Attributes:
        state: training, finished, failed or preempted. step, steps: taken, and in all. time: s since 1970.
        saving_s: the longest that one of its checkpoints took; None before the first.
    """

    state: Literal["training", "finished", "failed", "preempted"]
    step: int
    steps: int
    time: FiniteFloat
    saving_s: FiniteFloat | None = None


class Start(BaseModel):
    """A line of restarts.jsonl: that ranks have begun to train.

    Attributes:
        time: s since 1970. step: that they go on from. reason: start, resume (the command was given again), or why the
            launcher has started them again.
    """

    time: FiniteFloat
    step: NonNegativeInt
    ranks: PositiveInt
    nodes: PositiveInt
    reason: str


class _RunConfig(BaseModel):
    """What is read of a run's config.yaml, which may be untrusted; `model` is checked where it is built."""

    dataset: Annotated[str, Field(pattern="^[^\0]*$")]
    days: str | None = None
    missing_days: MissingDays = "refuse"
    tasks: list[str] | None = None
    model: dict[str, Any]
    train: dict[str, Any]


class LostRunError(UserError):
    """Another trainer has taken the run over: this one writes nothing more."""


class Run:
    """The files of a run below its folder.

    Raises:
        UserError: one of its files or folders is a link, or not what it should be. The folder of the run may be a link.

    Attributes:
        outbox: of the one process that trains a run on a store; its lines and heartbeats go through it.
    """

    def __init__(self, path: Path) -> None:
        if not on_store(path):  # which has no links
            _check_kinds(path)
        self.outbox: Outbox | None = None
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.train_metrics = path / "metrics" / "train.jsonl"
        self.progressive = path / "metrics" / "progressive.jsonl"
        self.search_metrics = path / "metrics" / "search.jsonl"
        self.eval_metrics = path / "metrics" / "eval.jsonl"
        self.tensorboard = path / "tensorboard"
        self.report = path / "report.html"
        self.saving_s: float | None = None  # see Status
        self.restarts = path / "restarts.jsonl"

    def create(self, config: dict[str, Any], schema: Schema) -> None:
        """Makes the folders and writes config.yaml and schema.yaml, each atomically."""
        for folder in (self.checkpoints, self.train_metrics.parent):
            make_folder(folder)
        contents = {"config.yaml": config, "schema.yaml": schema.model_dump(mode="json", exclude_unset=True)}
        for name, content in contents.items():
            write_text(self.path / name, yaml_of(content))

    def config(self) -> dict[str, Any]:
        """The configuration it was trained with.

        Raises:
            UserError: there is no run, or a file that is not what a training wrote.
        """
        file = self.path / "config.yaml"
        try:
            content = read_yaml(file)
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: no run (config.yaml is missing). Start one with jobs.train run={self.path}."
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"{file}: holds no keys. It is not as jobs.train wrote it: restore it.")
        try:
            _RunConfig.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{file}: {first_fault(error)}. It is not as jobs.train wrote it: restore it.") from None
        return content

    def schema(self) -> Schema:
        """The schema it was trained with, with the tasks it was trained on."""
        return Schema.load(self.path / "schema.yaml").only(self.config().get("tasks"))

    def lock(self, name: str, why: str) -> Lock:
        """A lock until it is released or its process ends. Raises UserError, with `why`, where another process has it."""
        if (lock := self.try_lock(name)) is None:
            raise UserError(f"{self.path}: {why}. Wait for it, or stop it.")
        return lock

    def try_lock(self, name: str) -> Lock | None:
        """As `lock`; None where another process has it, or has just removed its file. Raises UserError as `_lock`."""
        try:
            return self._lock(name, wait=False)
        except (BlockingIOError, FileNotFoundError):
            return None

    def wait_for_lock(self, name: str) -> Lock:
        """As `lock`, once whoever has it has released it or ended."""
        while True:
            with suppress(FileNotFoundError):  # removed meanwhile
                return self._lock(name, wait=True)

    def _lock(self, name: str, wait: bool) -> Lock:
        """Raises FileNotFoundError where the file was just removed; UserError where a store has no such bucket."""
        file = self.lock_file(name)
        try:
            make_folder(file.parent)
            with user_error_for_links(file):
                return storage_of(file).lock(file, wait=wait, create=True)
        except FileNotFoundError:
            _check_bucket(file)
            raise

    def lock_file(self, name: str) -> Path:
        """The file that is locked; whoever holds the lock may remove it."""
        return self.eval_metrics.with_name(f".{name}.lock")

    def write_status(self, state: str, step: int, steps: int) -> None:
        """Writes the heartbeat, or how the run ended; a full disk does not stop it."""
        status = Status(state=state, step=step, steps=steps, time=time.time(), saving_s=self.saving_s)
        if self.outbox:
            content = json_text(status.model_dump(), indent=1).encode()
            self.outbox.put(self.path / "status.json", lambda: content)
            return
        with suppress(OSError):
            write_json(self.path / "status.json", status.model_dump())

    def append(self, file: Path, record: dict[str, Any]) -> None:
        """Adds a line to a file of the run. Raises OSError where it cannot; on a store it is put some seconds later."""
        if self.outbox:
            self.outbox.append(file, record)
        else:
            append_line(file, record)

    def flush(self) -> None:
        """Puts the lines that `append` has kept for later. Raises OSError."""
        if outbox := self.outbox:  # which the trainer's thread drops at the end
            outbox.flush(only_lines=True)

    def status(self) -> Status | None:
        """The last heartbeat, None before the first. Raises UserError for a damaged one."""
        try:
            found = read_json(self.path, "status.json", MAX_STATUS_BYTES)
        except FileNotFoundError:
            return None
        return validated(Status, found, self.path / "status.json")

    def drop_lines_after(self, step: int) -> None:
        """Drops what training has written of later steps: a run that goes on from this one writes it again."""
        self.flush()
        for lines in (self.train_metrics, self.progressive, self.search_metrics):
            keep_lines(lines, step)
        if self.outbox:
            self.outbox.reload()

    def add_start(self, step: int, ranks: int, nodes: int, reason: str) -> None:
        """Adds a line to restarts.jsonl; a full disk does not stop it."""
        start = Start(time=time.time(), step=step, ranks=ranks, nodes=nodes, reason=reason)
        with suppress(OSError):
            append_line(self.restarts, start.model_dump())

    def starts(self) -> list[Start]:
        """When ranks have begun to train, and why each time, the first one first. Raises UserError for a damaged line."""
        return [validated(Start, line, self.restarts) for line in read_lines(self.restarts)]


def _check_bucket(file: Path) -> None:
    """Raises UserError where a file is on a store that has no such bucket, which is more than that it has no such file."""
    try:
        file.exists()
    except FileNotFoundError:
        bucket = "/".join(str(file).split("/")[:3])
        raise UserError(f"{file}: {bucket} does not exist. Make it, or choose another place.") from None


def config_hash(config: Any) -> str:
    """16 hex digits that identify a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines past a step: a run that resumes from a checkpoint writes them again.

    Raises:
        UserError: a line has no step.
    """
    kept = []
    for number, line in enumerate(read_lines(path), 1):
        if not isinstance(step := line.get("step"), int):
            raise UserError(f"{path}, line {number}: has no step. Remove it.")
        if step <= last_step:
            kept.append(line)
    if path.exists():
        write_text(path, "".join(json_text(line) + "\n" for line in kept))


def _check_kinds(path: Path) -> None:
    """Raises UserError where something of a run, as far as it is there, is a link or of another kind than it should be."""
    for name in FOLDERS:
        if refuse_link(folder := path / name).exists() and not folder.is_dir():
            raise irregular(folder, folder.stat().st_mode, "folder")
    for name in FILES:
        lstat_regular(path, name)
    for name in ("evaluations", "metrics", "predictions", "tensorboard"):
        for file in sorted((path / name).iterdir()) if (path / name).is_dir() else ():
            with suppress(FileNotFoundError):  # written and renamed meanwhile
                mode = file.lstat().st_mode
                is_other_folder = stat.S_ISDIR(mode) and (name == "tensorboard" or file.name.startswith("."))
                if not stat.S_ISREG(mode) and not is_other_folder:
                    raise irregular(file, mode)
