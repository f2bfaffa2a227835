"""jobs.draft: a first schema from raw files, with the reason of each guess beside it, to be reviewed and edited.

It reads some rows of each kind of file below a folder and finds the format, the columns and the files that refer to rows of
others. jobs.preprocess accepts the schema as it is. Where no label is found, nothing is written and candidates are listed.

Examples:
  python -m jobs.draft input=/logs out=my/conf/data/mine.yaml
  python -m jobs.draft input=../shared/data files=census-income.test.gz out=my/conf/data/mine.yaml label="c42 = '50000+.'"
  python -m jobs.draft input=/logs files='["imp-{date}.csv","clk-{date}.csv"]' out=my/conf/data/mine.yaml overwrite=true
"""

import shlex

from omegaconf import DictConfig

from jobs.command_line import check_name
from jobs.entry import job, parse
from pipeline.overrides import setting


@job("draft")
def main(config: DictConfig) -> None:
    """Writes the draft, prints what was found and the next command."""
    from pipeline.ingest.draft.config import DraftConfig
    from pipeline.ingest.draft.draft import draft

    settings: DraftConfig = parse(config, DraftConfig)
    check_name(settings.out, (settings.out.absolute().parent.name, settings.out.stem))
    for line in draft(settings).lines:
        print(line)
    folder, name = settings.out.parent.parent, settings.out.stem
    words = [f"--config-dir={folder}", setting("data", name), setting("out", f"runs/{name}")]
    print(f"{settings.out}: a draft. Read it, then:\n{shlex.join(['python', '-m', 'jobs.preprocess', *words])}")


if __name__ == "__main__":
    main()
