"""How every job starts: a Hydra configuration in, one line and an exit code out."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from features.errors import UserError

# Hydra prints its own errors over several lines unless told to let them through.
os.environ["HYDRA_FULL_ERROR"] = "1"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what a person can mend into one line on stderr and exit code 1; a defect of ours keeps its traceback."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        line = " ".join(str(error).split())
        sys.exit(f"error: {line}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; what was committed stays, run the same command again to go on")


def parse(config: DictConfig, model: type[BaseModel]) -> Any:
    """The configuration as a checked pydantic object.

    Raises:
        UserError: unknown keys, missing values or values of the wrong type, all named in one line.
    """
    try:
        return model.model_validate(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"configuration: {faults}. See --help for the keys.") from None


def job(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes `main(config)` a command line over jobs/conf/NAME.yaml."""

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        command = hydra.main(config_path="conf", config_name=name, version_base=None)(main)

        def run() -> None:
            with user_errors():
                command()

        return run

    return decorate
