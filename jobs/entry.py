"""How every job starts: a Hydra configuration in, one line and an exit code out."""

import errno
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from features.errors import Preempted, UserError
from features.schema.schema import Schema
from pipeline.storage.files import write_json

CONF = Path(__file__).parent / "conf"
PREEMPTED = os.EX_TEMPFAIL  # 75, which tells a scheduler that the job can go on
NOTES = "TASKFUSE_NOTES"  # names a folder in which each rank of a machine notes how far it has come (jobs.launch)

# Hydra prints its own errors over several lines unless told to let them through.
os.environ["HYDRA_FULL_ERROR"] = "1"

State = Literal["started", "preempted", "finished"]


class Note(NamedTuple):
    """What a rank says to jobs.launch. attempt: counts torchrun's restarts. ranks: of this machine."""

    state: State
    attempt: int
    pid: int
    ranks: int


def leave_note(state: State) -> None:
    """Tells jobs.launch, if that has started this process, how far it has come."""
    if not (folder := os.environ.get(NOTES)):
        return
    if state != "started":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would change the exit code
    env = os.environ
    note = Note(state, int(env["TORCHELASTIC_RESTART_COUNT"]), os.getpid(), int(env["LOCAL_WORLD_SIZE"]))
    path = Path(folder) / env["LOCAL_RANK"]
    with suppress(OSError):  # a full disk: the exit code says the same, if less surely
        write_json(path, note)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what a person can mend into one line on stderr and exit code 1; a defect of ours keeps its traceback."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        rank, line = os.environ.get("RANK", "0"), " ".join(str(error).split())
        if rank != "0":
            time.sleep(10)  # what all ranks find, rank 0 says, and torchrun ends the others
        sys.exit(f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}")
    except Preempted as notice:
        if os.environ.get("RANK", "0") == "0":
            print(notice, file=sys.stderr, flush=True)
        leave_note("preempted")
        sys.exit(PREEMPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}. Make room, then run the same command again.")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was committed stays, run the same command again to go on")


def parse(config: DictConfig, model: type[BaseModel]) -> Any:
    """The configuration as a checked pydantic object; the data group is read by `read_schema`.

    Raises:
        UserError: unknown keys, missing values or values of the wrong type, all named in one line.
    """
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    content.pop("data", None)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        places = ((".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors())
        faults = "; ".join(f"{where}: {what}" if where else what for where, what in places)
        raise UserError(f"configuration: {faults}. See --help for the keys.") from None


def read_schema(config: DictConfig) -> Schema:
    """The schema of the chosen data group. Raises UserError where none is chosen or it is not valid."""
    name = HydraConfig.get().runtime.choices.get("data")
    if name is None:
        raise UserError("data is missing: say data=NAME, one of jobs/conf/data (see --help)")
    return Schema.parse(OmegaConf.to_container(config.data.schema, resolve=True), where=f"{name}.yaml")


def describe(main: Callable[..., Any], name: str) -> str:
    """The text of --help: the job's docstring with examples, the groups and their values, the commented settings."""
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line and not line.startswith(("defaults:", " ", "#")))
    groups = [line.strip(" -").split(":")[0] for line in lines[:start] if line.startswith("  - ") and ":" in line]
    values = [f"  {group}=" + "|".join(sorted(p.stem for p in (CONF / group).glob("*.yaml"))) for group in groups]
    return "\n".join(
        [
            str(sys.modules[main.__module__].__doc__).strip(),
            *(["\nGroups, each a folder of jobs/conf (--config-dir=DIR adds files of your own):"] if values else []),
            *values,
            "\nSettings (any is overridden by its dotted name; ??? must be given):",
            *(f"  {line}" for line in lines[start:]),
            "\nHydra's own flags, such as --cfg job to print the configuration: --hydra-help",
        ]
    )


def job(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes `main(config)` a command line over jobs/conf/NAME.yaml."""

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def checked(config: DictConfig) -> None:
            # Inside, since Hydra adds a line of its own to what passes through it.
            with user_errors():
                main(config)

        def told_to_end(*_: object) -> None:
            """Outside the training loop, which takes SIGTERM itself."""
            if name != "train":
                sys.exit(128 + signal.SIGTERM)
            leave_note("preempted")
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"told to end; the same command goes on from the newest checkpoint, if there is one\n")
            sys.exit(PREEMPTED)

        command = hydra.main(config_path=str(CONF), config_name=name, version_base=None)(checked)

        def run() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(describe(main, name))
                return
            # So that a job that is told to end still cleans up behind itself.
            signal.signal(signal.SIGTERM, told_to_end)
            leave_note("started")
            with user_errors():
                command()
            leave_note("finished")

        return run

    return decorate
