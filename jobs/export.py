"""jobs.export: a checkpoint as a package that answers without the library that trained it.

Examples:
  python -m jobs.export run=runs/demo/adatt out=packages/adatt
  python -m jobs.export run=runs/demo/adatt step=440 out=packages/adatt-440 tables=int8 rows=occurring archive=true
  python -m jobs.export serving=/releases out=/packages/2026-11-22 tables=fp16 target=aot
  python -m jobs.export run=runs/demo/adatt out=packages/adatt-880 since=440
"""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from jobs.entry import job, parse

if TYPE_CHECKING:
    from pipeline.release.export.config import ExportConfig


def checked(config: DictConfig) -> "ExportConfig":
    """The checked settings. Raises UserError."""
    from pipeline.release.export.config import ExportConfig

    found: ExportConfig = parse(config, ExportConfig)
    return found


@job("export")
def main(config: DictConfig) -> None:
    """Writes the package and prints how far it is from its checkpoint."""
    from pipeline.release.export.export import export, report

    print(report(export(checked(config))))


if __name__ == "__main__":
    main()
