"""jobs.serve: a package to an HTTP server of predictions, until SIGTERM.

POST /score takes {"user": {...}, "candidates": [{...}, ...]} and answers {"model": {...}, "scores": {TASK: [...]}}; /docs says
what a row may have; /healthz, /metrics and /model are for those who run it. Needs taskfuse[serve].

Examples:
  python -m jobs.serve package=runs/census/package
  python -m jobs.serve package=/packages/today port=8080 threads=4 reuse_port=true
  python -m jobs.serve packages=/packages serving=/nightly host=0.0.0.0 compiled=true
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from features.errors import UserError
from jobs.entry import job, parse
from pipeline.quick_imports import quick_imports

if TYPE_CHECKING:
    from pipeline.serving.http.config import ServeConfig


def checked(config: DictConfig) -> "ServeConfig":
    """The checked settings. Raises UserError."""
    from pipeline.serving.http.config import ServeConfig

    found: ServeConfig = parse(config, ServeConfig)
    return found


@job("serve")
def main(config: DictConfig) -> None:
    """Loads the package and serves it."""
    settings = checked(config)
    try:
        with quick_imports():  # nor does a collection during a request go over what they left
            import torch

            from pipeline.serving.http.server import serve
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise UserError(f"the package {error.name} is missing: pip install 'taskfuse[serve]'") from None
    torch.set_num_threads(1)  # of each thread that scores: those of different requests would fight for cores
    serve(settings)


if __name__ == "__main__":
    main()
