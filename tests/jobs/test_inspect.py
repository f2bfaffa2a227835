"""jobs.inspect on a dataset whose every number is known."""

import subprocess
import sys
from pathlib import Path

import pytest
from dataset_by_hand import draw_rows, write_dataset

from jobs.inspect import main


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "mine"
    write_dataset(folder, draw_rows(500))
    return folder


def cells(output: str, first: str) -> list[str]:
    """The line of a table that starts with a word, cut into its cells."""
    return next(line for line in output.splitlines() if line.startswith(first)).split()


def test_tables_are_printed_and_the_page_is_written_beside_the_dataset(dataset, capsys):
    before = sorted(dataset.rglob("*"))
    main([str(dataset)])
    output = capsys.readouterr().out
    rows = draw_rows(500)
    train = [row for row in rows.to_pylist() if row["split"] == 0]
    assert cells(output, "train") == ["train", "300", "58.3%"]
    assert cells(output, "read") == ["read", "515", "100.0%"]
    assert cells(output, "city")[1] == f"{sum(row['city'] is None for row in train) / 3:.1f}%"
    clicked = [row["label.click"] for row in train]
    assert f"{sum(clicked) / 3:.1f}%" in cells(output.partition("\nTasks")[2], "click")
    assert "verified" not in output
    page = dataset.with_name("mine.card.html")
    assert str(page) in output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(dataset.rglob("*")) == before


def test_a_check_says_what_it_checked_and_the_page_goes_where_it_is_told(dataset, tmp_path, capsys):
    main([str(dataset), "--verify", "--html", str(tmp_path / "page.html")])
    output = capsys.readouterr().out
    assert "verified  row ids: 500, each there once" in output
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "statistics.json").unlink(), "statistics.json is missing"),
        (lambda folder: (folder / "more.parquet").write_text(""), "more.parquet: the manifest does not name"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(tmp_path, damage, words):
    write_dataset(tmp_path / "data", draw_rows(50))
    damage(tmp_path / "data")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "data"), "--verify"])
    assert str(caught.value).startswith("error: ")  # what Python prints to stderr, with exit code 1
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_days_says_which_there_are_and_how_to_inspect_one(tmp_path):
    for day in ("2026-10-31", "2026-11-01", "2026-11-03"):
        write_dataset(tmp_path / day, draw_rows(50))
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--verify"])
    assert str(caught.value) == (
        f"error: {tmp_path} holds the days 2026-10-31..2026-11-01, 2026-11-03. "
        f"Inspect one: jobs.inspect {tmp_path}/2026-10-31."
    )
    assert list(tmp_path.glob("*.html")) == []
    main([str(tmp_path / "2026-10-31"), "--verify"])


def test_a_page_that_cannot_be_written_is_said_in_one_line(dataset, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([str(dataset), "--html", str(tmp_path / "none" / "page.html")])
    assert "cannot be written (No such file or directory)" in str(caught.value)


def test_the_command_line_ends_with_code_1_where_there_is_no_dataset(tmp_path):
    command = [sys.executable, "-m", "jobs.inspect", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60, check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: {tmp_path}: no dataset (manifest.json is missing). Run jobs.preprocess out={tmp_path} first.\n"
    )
