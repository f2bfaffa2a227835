"""The record of each submission: what was submitted where, by which command. A JSON file a submission, without secrets."""

import getpass
import os
import random
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from features.errors import UserError, did_you_mean
from features.plain_json import first_fault, read_json
from pipeline.cluster.base import Workload, state_folder
from pipeline.cluster.registry import open_cluster
from pipeline.cluster.values import Label
from pipeline.overrides import setting
from pipeline.storage.files import make_folder, write_json
from pipeline.storage.store_path import Place

MAX_RECORD_BYTES = 1 << 20
ALPHABET = "bcdfghjkmnpqrstvwxz23456789"  # of random names: no vowels, none that look alike


class Record(BaseModel):
    """One submission.

    Attributes:
        name: its id. job: of JOBS. cluster: the name of its file. settings: what stood there, with the overrides.
        work: as the backend got it. native: the backend's own id; None while it is being submitted.
        run: folder of the run as the job sees it; None for a job without one.
        command: what was typed. revision: of this code, by git. config: hash of the job's configuration.
        time: s since 1970. user: who submitted. resubmits: the submission that this one repeats.
    """

    model_config = ConfigDict(extra="forbid")

    name: Label
    job: str
    cluster: str
    settings: dict[str, Any]
    work: Workload
    native: str | None = None
    run: Place | None = None
    command: list[str]
    revision: str
    config: str
    time: Annotated[float, Field(ge=0)]
    user: str
    resubmits: str | None = None

    def backend(self) -> Any:
        """The backend that it was submitted to. Raises UserError where this version does not read its settings."""
        return open_cluster(self.settings, f"submission {self.name}")

    def submitted(self) -> str:
        """The native id. Raises UserError where its submission was cut off before there was one."""
        if self.native is None:
            raise UserError(
                f"{self.name}: jobs.submit was cut off while it was submitted: look on {self.cluster} for a job of this name"
            )
        return self.native


class Records:
    """The records in a folder.

    Args:
        folder: None: submissions in the state folder of this machine's user.

    Attributes:
        option: what a command that is to find these records needs after an id, with a space before it; empty for None.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder or state_folder() / "submissions"
        self.option = f" {shlex.quote(setting('submissions', folder))}" if folder else ""

    def reserve(self, record: Record) -> None:
        """Writes a new record before the job is submitted: whatever happens then, it is known.

        Raises:
            UserError: there is one of that name, or no folder for it.
        """
        try:
            make_folder(self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be made ({error.strerror}): set submissions= to another folder"
            ) from None
        file = self.file(record.name)
        try:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            raise UserError(
                f"a submission {record.name} exists: choose another name=, or jobs.submit resubmit {record.name}"
            ) from None
        try:
            self.write(record)
        except BaseException:
            self.remove(record.name)  # the disk is full, or it was interrupted: nothing is submitted yet
            raise

    def write(self, record: Record) -> None:
        """Replaces a record."""
        write_json(self.file(record.name), record.model_dump(mode="json"))

    def remove(self, name: str) -> None:
        """Removes the record of a submission that was refused."""
        self.file(name).unlink(missing_ok=True)

    def read(self, name: str) -> Record:
        """One record. Raises UserError where there is none, or a damaged one."""
        try:
            if not _is_name(name):
                raise FileNotFoundError
            content = read_json(self.folder, f"{name}.json", MAX_RECORD_BYTES)
        except FileNotFoundError:
            near = did_you_mean(name, self.names())
            raise UserError(f"no submission {name}{near} in {self.folder}: jobs.submit list shows them") from None
        try:
            record = Record.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{self.file(name)}: {first_fault(error)}") from None
        if record.name != name:
            raise UserError(f"{self.file(name)}: is the record of {record.name}: rename or remove the file")
        return record

    def names(self) -> list[str]:
        """Of all submissions. A file whose name is no id is not a record."""
        files = self.folder.glob("*.json") if self.folder.is_dir() else []
        return sorted(file.stem for file in files if _is_name(file.stem))

    def all(self) -> tuple[list[Record], list[str]]:
        """All records that can be read, the newest first, and what is wrong with the others."""
        found, faults = list[Record](), list[str]()
        for name in self.names():
            try:
                found.append(self.read(name))
            except UserError as error:
                faults.append(str(error))
        return sorted(found, key=lambda record: -record.time), faults

    def file(self, name: str) -> Path:
        """Where the record of a name is."""
        return self.folder / f"{name}.json"

    def new_name(self, job: str) -> str:
        """A name for a submission that was given none."""
        taken = set(self.names())
        while (name := f"{job}-{''.join(random.choices(ALPHABET, k=5))}") in taken:
            pass
        return name

    def next_name(self, name: str) -> str:
        """The name under which a submission is submitted again: NAME-2, NAME-3 and so on."""
        taken = set(self.names())
        return next(found for n in range(2, 1000) if (found := f"{name[:48]}-{n}") not in taken)


def _is_name(text: str) -> bool:
    try:
        TypeAdapter(Label).validate_python(text)
    except ValidationError:
        return False
    return True


def revision() -> str:
    """Of this code: the git commit, with + where files have changed since; else the version of the package."""
    from importlib.metadata import version

    root = Path(__file__).parents[2]
    with suppress(OSError, subprocess.SubprocessError):
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain") else "")
    return version("taskfuse")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def user() -> str:
    """Who submits."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in the password database
        return str(os.getuid())
