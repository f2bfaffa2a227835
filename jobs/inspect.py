"""jobs.inspect: what a dataset holds and where its raw rows went, as tables and as an HTML page beside it.

Examples:
  python -m jobs.inspect runs/census/data
  python -m jobs.inspect runs/census/data --verify
  python -m jobs.inspect runs/census/data --html census.html
"""

import argparse
from pathlib import Path

from tabulate import tabulate

from features.errors import UserError
from jobs import command_line
from jobs.entry import user_errors
from pipeline.dataset.card.card import read_card
from pipeline.dataset.card.page import page, page_file
from pipeline.dataset.card.tables import tables
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.days import day_ranges
from pipeline.dataset.past_state import state_lines
from pipeline.dataset.verify import verify
from pipeline.storage.files import write_text
from pipeline.storage.store_path import place
from pipeline.terminal import escape_output


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables, writes the page and, on request, checks every file."""
    escape_output()
    parser = argparse.ArgumentParser(
        prog="python -m jobs.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=place, help="the dataset's folder, a path or URL")
    parser.add_argument("--verify", action="store_true", help="read every file and check it against the manifest")
    parser.add_argument(
        "--html", type=place, metavar="FILE", help="the page; by default DATASET.card.html beside the folder"
    )
    given = parser.parse_args(arguments)
    with user_errors():
        command_line.check_utf8([str(given.dataset), str(given.html)])
        inspect(given.dataset, given.html, given.verify)


def inspect(path: Path, html: Path | None, check: bool) -> None:
    """Shows one dataset.

    Args:
        html: the page's file; None: the folder's name with .card.html, beside it.
        check: whether its files are also read and compared with the manifest.

    Raises:
        UserError: no dataset, a folder of days, no card, a page that cannot be written, or a failed check.
    """
    if not (path / "manifest.json").exists() and (days := day_ranges(path)):
        raise UserError(f"{path} holds the days {', '.join(days)}. Inspect one: jobs.inspect {path / days[0][:10]}.")
    dataset = Dataset(path)
    card = read_card(path, dataset.schema)
    for table in tables(dataset.manifest, card):
        print(f"{table.title}\n")
        right = ("left", *["right"] * (len(table.header) - 1))
        print(tabulate(table.lines, table.header, tablefmt="simple", disable_numparse=True, colalign=right), end="\n\n")
    for line in state_lines(dataset.manifest.state) if dataset.manifest.state else ():
        print(f"state     {line}")
    if check:
        for line in verify(dataset):
            print(f"verified  {line}", flush=True)
    name = path.resolve().name
    file = html or page_file(path)
    try:
        write_text(file, page(name, dataset.manifest, card))
    except OSError as error:
        raise UserError(
            f"{file}: the page cannot be written ({error.strerror}). Choose another file with --html."
        ) from None
    print(f"page      {file}")


if __name__ == "__main__":
    main()
