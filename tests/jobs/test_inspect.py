"""jobs.inspect on a dataset whose every number is known."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from dataset_by_hand import draw_rows, fit_encoders, write_dataset

from jobs.inspect import main
from pipeline.dataset.card.tables import number, percent


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
    assert "2026-03-04..2026-03-05" in output
    assert "verified" not in output
    page = dataset.with_name("mine.card.html")
    assert str(page) in output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(dataset.rglob("*")) == before


def test_a_check_says_what_it_checked_and_the_page_goes_where_it_is_told(dataset, tmp_path, capsys):
    main([str(dataset), "--verify", "--html", str(tmp_path / "page.html")])
    output = capsys.readouterr().out
    assert "verified  row ids: 500, all unique" in output
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


def test_a_reader_that_takes_only_the_first_lines_ends_it_without_a_word(dataset):
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.inspect", str(dataset)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_valid_and_test_stand_beside_train(dataset, capsys):
    rows = draw_rows(500)
    encoders, _ = fit_encoders(rows.filter(pa.array(rows["split"].to_numpy() == 0)))
    main([str(dataset)])
    lines = capsys.readouterr().out.splitlines()
    numbers = [re.split(r"\s{2,}", line) for line in lines if line.startswith(("number ", "price "))]
    assert numbers[0][1:7] == ["missing", "missing valid", "missing test", "mean", "mean valid", "mean test"]
    known = set(encoders.vocabularies["city"].to_pylist())
    for place, code in ((2, 1), (3, 2)):
        mine = [row for row in rows.to_pylist() if row["split"] == code]
        prices = [row["price"] for row in mine if row["price"] is not None]
        assert numbers[1][place] == percent((len(mine) - len(prices)) / len(mine))
        assert numbers[1][place + 3] == number(sum(prices) / len(prices))
        cities = [row["city"] for row in mine if row["city"] is not None]
        ids = [re.split(r"\s{2,}", line) for line in lines if line.startswith(("id ", "city "))]
        assert ids[0][6:9] == ["unknown", "unknown valid", "unknown test"]
        assert ids[1][place + 5] == percent(sum(city not in known for city in cities) / len(cities))
