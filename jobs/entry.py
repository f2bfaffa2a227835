"""How every job starts: a Hydra configuration in, one line and an exit code out."""

import errno
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from features.errors import OtherRankError, Preempted, UserError, did_you_mean, fault_text, join_faults, one_line
from features.printable import printable
from features.schema.schema import Schema
from jobs import command_line
from jobs.command_line import CONF
from jobs.mistyped import explained
from jobs.quoting import quoted, refused, typed
from jobs.versions import check_versions
from pipeline.terminal import escape_output
from pipeline.training.faults.preemption import PREEMPTED
from pipeline.training.faults.rank_status import write_rank_status

LEVELS = ("debug", "info", "warning", "error")
DATA_VARIABLE = "TASKFUSE_DATA"  # the one that jobs/conf reads

DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
STORE_ERRNOS = {errno.ETIMEDOUT, errno.ENOPKG}  # see pipeline.storage.patience and systems
# Errors of the system that say what is wrong with a file that a user named, and not with this program.
FILE_ERRNOS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}

# Hydra prints its own errors over several lines unless it lets them through.
os.environ["HYDRA_FULL_ERROR"] = "1"


class LogHandler(logging.Handler):
    """Log lines on stderr, above a progress bar where there is one: time, the rank where there are several, message."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        with suppress(OSError):  # a closed terminal must not end a run
            keep = "\n\t" if record.exc_info else "\t"  # a line break of a message would look like another record
            tqdm.write(printable(self.format(record), keep), file=sys.stderr)


def configure_logging(level: str) -> None:
    """Log lines of this project go to stderr from `level` on: debug, info, warning or error."""
    rank = f"rank {os.environ['RANK']}  " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    handler = LogHandler()
    if level not in LEVELS:
        raise UserError(f"log_level={level} is not one of {', '.join(LEVELS)}")
    handler.setFormatter(logging.Formatter(f"%(asctime)s  {rank}%(message)s", "%H:%M:%S"))
    for name in ("features", "models", "pipeline"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False  # libraries give the root logger handlers of their own
        logger.setLevel(level.upper())
    threading.excepthook = thread_error


def thread_error(error: threading.ExceptHookArgs) -> None:
    """Prints no traceback where a thread of a library meets a full disk, as TensorBoard's does: its next write reports it."""
    if not (isinstance(error.exc_value, OSError) and error.exc_value.errno in DISK_FULL_ERRNOS):
        threading.__excepthook__(error)


def environment(name: str, default: str | None = None) -> str:
    """`${oc.env:NAME,DEFAULT}` in jobs/conf. Other variables may be secrets, and what a setting says is written down.

    Raises:
        UserError: another variable, or one that is not set and has no default.
    """
    if name != DATA_VARIABLE:
        raise UserError(
            f"${{oc.env:{name}}} is not read: only {DATA_VARIABLE} is, since settings are written down. Let the shell "
            f"put the value in: KEY=${name}."
        )
    if (value := os.environ.get(name, default)) is None:
        raise UserError(f"the environment variable {name} is not set")
    return value


def bound_resolvers() -> None:
    """Leaves of OmegaConf's own resolvers the one that jobs/conf uses."""
    for name in ("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.select"):
        OmegaConf.clear_resolver(name)
    OmegaConf.register_new_resolver("oc.env", environment, replace=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a user error into one line on stderr and exit code 1; a defect of ours keeps its traceback."""
    try:
        yield
        sys.stdout.flush()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        message = str(error)
        if isinstance(error, MissingMandatoryValue):
            message = f"{error.full_key} is missing: add {error.full_key}=VALUE. --help says what it is."
        rank, line = os.environ.get("RANK", "0"), printable(" ".join(message.split()))
        write_rank_status("lost" if isinstance(error, OtherRankError) else "failed", line)
        if rank != "0":
            time.sleep(10)  # an error of all ranks is printed by rank 0, and torchrun ends the others
        line = f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}"
        if isinstance(error, OtherRankError):
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
            # The thread of a checkpoint may wait in C++ for that rank just now: an orderly end would abort this process.
            os._exit(1)
        sys.exit(line)
    except Preempted as preempted:
        if os.environ.get("RANK", "0") == "0":
            print(printable(str(preempted)), file=sys.stderr, flush=True)
        write_rank_status("preempted")
        sys.exit(PREEMPTED)
    except OSError as error:
        if error.errno == errno.EROFS:
            sys.exit(
                f"error: {error.filename or 'a file'}: {error.strerror}. Choose another folder for what this job writes; "
                "on Kubernetes one below /runs, for preprocess also below /data."
            )
        if error.errno == errno.EACCES and "://" in str(error.filename):
            line = (
                f"error: {printable(str(error.filename))[:300]}: {printable(str(error.strerror))}. Check the credentials in "
                "the environment or the store's own configuration; what was committed is kept: run the same command again."
            )
            write_rank_status("failed", line)
            sys.exit(line)
        if error.errno in FILE_ERRNOS and error.filename is not None:
            sys.exit(
                f"error: {printable(os.fsdecode(error.filename))[:300]}: {error.strerror}. Choose another file or folder."
            )
        if error.errno in STORE_ERRNOS and error.filename is not None:
            what = f"{printable(os.fsdecode(error.filename))[:300]}: {printable(str(error.strerror))}"
            first = "Install it, then" if error.errno == errno.ENOPKG else "What was committed is kept:"
            line = f"error: {what}. {first} run the same command again."
            write_rank_status("failed", line)
            sys.exit(line)
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        file = printable(str(error.filename or "a file"))
        sys.exit(f"error: {file}: {error.strerror}. Free space, then rerun the same command.")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was committed is kept, rerun the same command to resume")


def parse(config: DictConfig, model: type[BaseModel]) -> Any:
    """The configuration as a checked pydantic object; the data group is read by `read_schema`.

    Raises:
        UserError: unknown keys, missing values or values of the wrong type, all named in one line.
    """
    content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    for key in ("data", "log_level"):  # of the entry point
        content.pop(key, None)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        places = ((".".join(map(str, e["loc"])), message_of(e, model)) for e in error.errors())
        faults = join_faults([f"{where}: {what}" if where else what for where, what in places])
        raise UserError(f"configuration: {faults}. See --help for the keys.") from None


def message_of(error: Any, model: type[BaseModel]) -> str:
    """What one validation error says, and what to type where that is known.

    Of a key at the top that the job does not have it is the nearest one that it has, of a text or a day that Hydra reads as
    a whole number the text in quotes or the form of a day.
    """
    message = fault_text(error)
    if error["type"].startswith("date_") and type(error["input"]) is int:
        from pipeline.dataset.days import written_out

        return f"{error['input']} is no date as YYYY-MM-DD: write {written_out(error['input'])}"
    is_number = error["type"] in ("string_type", "path_type") and type(error["input"]) is int
    if is_number and all(isinstance(part, str) for part in error["loc"]):
        message += f": type {typed('.'.join(error['loc']), str(error['input']))}"
    known = [str(field.alias or name) for name, field in model.model_fields.items()]
    mistyped = error["type"] == "extra_forbidden" and len(error["loc"]) == 1
    return message + (did_you_mean(str(error["loc"][0]), known) if mistyped else "")


def read_schema(config: DictConfig, name: str | None = None) -> Schema:
    """The schema of the chosen data group. Raises UserError where none is chosen or it is not valid.

    Args:
        name: of the data group; None: the one that this process was started with.
    """
    name = name or HydraConfig.get().runtime.choices.get("data")
    if name is None:
        raise UserError("data is missing: set data=NAME, one of jobs/conf/data (see --help)")
    data = config.get("data")
    schema = data.get("schema") if isinstance(data, DictConfig) else None
    if not isinstance(schema, DictConfig):
        raise UserError(f"{name}.yaml: schema is missing, or has no keys (features/SCHEMA.md lists them)")
    command_line.check_plain(schema, f"{name}.yaml: schema")
    return Schema.parse(OmegaConf.to_container(schema, resolve=True), where=f"{name}.yaml")


def describe(main: Callable[..., Any], name: str) -> str:
    """The text of --help: the job's docstring with examples, the groups and their values, the commented settings."""
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line and not line.startswith(("defaults:", " ", "#")))
    groups = [
        line.strip(" -").split(":")[0]
        for line in lines[:start]
        if line.startswith("  - ") and ":" in line and "override" not in line
    ]
    values = [f"  {group}=" + "|".join(sorted(p.stem for p in (CONF / group).glob("*.yaml"))) for group in groups]
    return "\n".join(
        [
            str(sys.modules[main.__module__].__doc__).strip(),
            *(
                ["\nGroups, each a folder of jobs/conf (--config-dir=DIR adds files to the same folders of DIR):"]
                if values
                else []
            ),
            *values,
            "\nSettings (any is overridden by its dotted name; ??? must be given):",
            *(f"  {line}" for line in lines[start:]),
            "  log_level: info             # debug, info, warning, error",
            "\nHydra's own flags, such as --cfg job to print the configuration: --hydra-help",
        ]
    )


def job(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes `main(config)` a command line over jobs/conf/NAME.yaml."""

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        def run() -> None:
            escape_output()
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(describe(main, name), flush=True)
                return
            signal.signal(signal.SIGTERM, sigterm_handler(name))  # so that an ended job still cleans up behind itself
            write_rank_status("started")
            with user_errors():
                command_line.check(sys.argv[1:])
                sys.argv[1:] = quoted(sys.argv[1:])
                bound_resolvers()
                compose_and_run(main, name)
            write_rank_status("finished")

        return run

    return decorate


def sigterm_handler(name: str) -> Callable[..., None]:
    """What SIGTERM does to the job `name` outside the training loop, which handles it itself."""

    def handle(*_: object) -> None:
        if name not in ("train", "search"):
            sys.exit(128 + signal.SIGTERM)
        write_rank_status("preempted")
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"SIGTERM outside of training: nothing is lost. Rerun the same command to start or resume.\n")
        os._exit(PREEMPTED)  # an exception would be lost in a destructor, where Python ends

    return handle


@contextmanager
def composing() -> Iterator[None]:
    """Turns what Hydra says of a word or of a group's value into a UserError of one line."""
    try:
        yield
    except OverrideParseException as error:
        raise refused(error.override, error.message.splitlines()[0]) from None
    except ConfigCompositionException as error:
        raise explained(error) from None


def compose_and_run(main: Callable[[DictConfig], None], name: str) -> None:
    """Calls `main` with the configuration that Hydra composes of jobs/conf/NAME.yaml and the command line.

    Raises:
        UserError: the command line, or a file that it names, cannot be read.
    """
    composed = False

    @functools.wraps(main)
    def checked(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        # Inside, since Hydra adds a line of its own to what passes through it.
        with user_errors():
            command_line.check_composed(config)
            configure_logging(config.get("log_level", "info"))
            check_versions()
            main(config)

    try:
        with composing():
            hydra.main(config_path=str(CONF), config_name=name, version_base=None)(checked)()
    except (UserError, HydraException, OmegaConfBaseException, OSError):
        raise
    except Exception as error:
        if composed:
            raise
        # Hydra and its parsers have many exceptions for a command line or a file that they cannot read.
        raise UserError(f"the command line cannot be read: {type(error).__name__}: {one_line(error)}") from None
