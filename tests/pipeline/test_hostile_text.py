"""Text of data controls neither a terminal nor a page: streams, log lines, tables, reports, pictures, JSON lines."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile_text import HOSTILE, ORDINARY, Page, assert_tame
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from features.errors import Preempted, UserError
from features.printable import printable
from jobs.entry import configure_logging, user_errors
from pipeline.evaluation.report import page
from pipeline.evaluation.report.plots import learning_curves
from pipeline.evaluation.report.results import Results
from pipeline.evaluation.report.tables import table
from pipeline.run.run import Run
from pipeline.run.tracking.base import TRAIN, Job
from pipeline.run.tracking.registry import opened
from pipeline.run.tracking.settings import TrackingSettings
from pipeline.search import report
from pipeline.search.comparison import Entry
from pipeline.storage.files import append_line, read_lines, write_json
from pipeline.terminal import PrintableStream, escape_output
from pipeline.training.logging.metrics_writer import MetricsWriter


@contextmanager
def escaped() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What this process writes to stdout and stderr after escape_output."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setenv("PYTHON_COLORS", "1")
        escape_output()
        yield out, err


# The terminal


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_job_prints_controls_no_terminal(text: str) -> None:
    with escaped() as streams:
        print(text, f"\r{text}", end="")
        print(f"a{text}", file=sys.stderr)
        sys.stderr.writelines([f"a{text}"])
    for stream in streams:
        assert_tame(stream.getvalue())
    assert printable(text, "\n") in streams[0].getvalue()


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_printed_as_it_is(text: str) -> None:
    with escaped() as streams:
        print(f"{text}\t{text}")
        print(f"\r{text}", file=sys.stderr)  # as progress bars are redrawn
    assert [stream.getvalue() for stream in streams] == [f"{text}\t{text}\n", f"\r{text}\n"]


def test_output_is_escaped_once_and_is_otherwise_the_streams() -> None:
    with escaped():
        once = sys.stdout
        escape_output()
        assert sys.stdout is once
        assert isinstance(sys.stdout, PrintableStream)
        assert not sys.stdout.isatty()
        assert sys.stdout.write("a\x1b") == 2
        sys.stdout.flush()


@pytest.mark.parametrize("text", [*HOSTILE, *ORDINARY])
def test_a_log_record_is_one_line(text: str) -> None:
    with escaped() as (_, err):
        configure_logging("info")
        logging.getLogger("pipeline.test").warning("skipped %s", text)
    [line] = err.getvalue().split("\n")[:-1]
    assert_tame(line)
    assert line.endswith(f"  skipped {printable(text)}")


def test_the_traceback_of_a_log_record_keeps_its_lines() -> None:
    with escaped() as (_, err):
        configure_logging("info")
        try:
            raise ValueError("\x1b[31m")
        except ValueError:
            logging.getLogger("pipeline.test").exception("failed")
    assert "failed\nTraceback" in err.getvalue()
    assert_tame(err.getvalue())


@pytest.mark.parametrize("text", [*HOSTILE, *ORDINARY])
def test_the_error_of_a_job_is_one_line_without_controls(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise UserError(f"{text}: column x is missing")
    assert_tame(str(stopped.value), keep="")
    assert str(stopped.value) == f"error: {printable(' '.join(text.split()))}: column x is missing"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit), user_errors():
        raise Preempted(f"saved {text}")
    assert capsys.readouterr().err == f"saved {printable(text)}\n"


SCRIPT = """
import argparse, logging, sys, warnings
from pipeline.terminal import escape_output
escape_output()
evil = "\\x1b]0;owned\\x07\\x9b31m\\u202e\\x00"
print(evil)
warnings.warn(evil)
logging.basicConfig()
logging.error(evil)
print(evil, file=sys.stderr)
try:
    argparse.ArgumentParser().parse_args([evil])
except SystemExit:
    pass
raise ValueError(evil)
"""


def test_warnings_other_libraries_logs_and_tracebacks_are_escaped_too() -> None:
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", SCRIPT], capture_output=True, timeout=60)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert_tame(out)
    assert_tame(err)
    shown = "\\x1b]0;owned\\x07\\x9b31m\\u202e\\x00"
    assert out == f"{shown}\n"
    assert err.count(shown) == 5
    assert err.endswith(f"ValueError: {shown}\n")


# Tables, pictures and pages


def results_of(tasks: list[str], folder: Path, dataset: str = "data") -> Results:
    kinds = dict.fromkeys(tasks, "binary")
    metrics: dict[str, dict[str, Any]] = {task: {"ne": 0.9, "auc": 0.7, "calibration": 1.0} for task in tasks}
    gates = [[[0.5, 0.5]] * len(tasks)]
    records = [{"step": step, "rows": step * 100, "metrics": metrics, "gates": gates} for step in (1, 2)]
    return Results(Run(folder), "test", dataset, kinds, records, metrics)


@pytest.mark.parametrize("style", ["simple", "html"])
def test_tables_of_evaluations_have_no_controls_and_html_no_markup_of_names(tmp_path: Path, style: str) -> None:
    plain = table(results_of(["x"] * len(HOSTILE), tmp_path), style)
    found = table(results_of(HOSTILE, tmp_path), style)
    assert_tame(found)
    assert found.count("\n") == plain.count("\n") + (len(HOSTILE) - 1) * 3 * (style == "html")
    assert "<script" not in found or style == "simple"
    for name in ORDINARY:
        assert name in table(results_of([name], tmp_path), style)


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_a_report_has_no_markup_of_data_and_loads_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run<b>\x1b]0;owned\x07"
    folder.mkdir()
    dataset = '/data/</title><img src=x onerror="x()">\x9b\udcff'
    tasks = ["<script>x()</script>", "$x_{$", "漢字", "</script><b>", "{{ 7*7 }}", '"><i>']
    page.write_run(results_of(tasks, folder, dataset))
    text = Run(folder).report.read_text(encoding="utf-8")
    parsed = Page(text)
    assert_tame(text)
    assert not parsed.tags & {"img", "iframe", "object", "embed", "link", "base", "form", "b", "i"}
    assert text.count("<script") == text.count("</script") == 1
    assert not any(name.startswith("on") or name in ("src", "style", "srcset") for name, _ in parsed.attributes)
    links = [value or "" for name, value in parsed.attributes if name in ("href", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "default-src 'none'" in text
    for name in [*tasks, printable(dataset), "run<b>\\x1b]0;owned\\x07"]:
        assert name in "".join(parsed.texts)
    assert (folder / "ne.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_pictures_draw_any_name_letter_by_letter(tmp_path: Path) -> None:
    names = [*HOSTILE, *ORDINARY, "$", "a$b$c", "\\$x$", "$\\frac{$"]
    curves = learning_curves(results_of(names, tmp_path))
    titles = [axes.title for axes in curves.axes]
    drawn = [title._preprocess_math(title.get_text()) for title in titles]  # and whether it is a formula
    assert drawn == [(printable(name), False) for name in names]
    figure = learning_curves(results_of(["$\\frac{$", "a\nb\x1b"], tmp_path))
    figure.savefig(io.BytesIO(), format="png", dpi=20)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    tasks = [*HOSTILE, *ORDINARY]
    monkeypatch.setattr(report, "differences", lambda *_: dict.fromkeys(tasks, (1.0, 0.5)))
    metrics = {task: {"auc": 0.7, "ne": 0.9} for task in tasks}
    run = {"metrics": metrics, "rows_per_s": 10.0, "early": {"1/7": metrics, "3/7": metrics, "7/7": metrics}}
    return [Entry(name, [run]) for name in [*HOSTILE, *ORDINARY]]


def test_tables_of_a_comparison_have_a_cell_a_name_in_markdown_too(entries: list[Entry]) -> None:
    kinds = dict.fromkeys([*HOSTILE, *ORDINARY], "binary")
    plain, markdown = (report.tables(entries, entries[0], kinds, style) for style in ("simple", "github"))
    for text in (plain, markdown):
        assert_tame(text)
        assert all(name in text for name in ORDINARY if "\\" not in name)
    parts = markdown.split("\n\n")
    assert [len({line.count("|") for line in part.splitlines()}) for part in parts] == [1, 1, 1]
    assert [len(part.splitlines()) for part in parts] == [len(entries) + 2, len(entries) + 2, len(entries) + 1]
    assert "<" not in markdown
    assert "a&#124;b" in markdown
    assert "<script>x()</script>" in plain


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_the_picture_of_a_comparison_can_be_drawn_whatever_the_names(entries: list[Entry]) -> None:
    figure = report.picture(entries[-8:], entries[-8], dict.fromkeys(["$x_{$"], "binary"))
    figure.savefig(io.BytesIO(), format="png", dpi=20)


# Files that are shown later


def test_json_has_no_control_character_and_is_read_back_as_it_was(tmp_path: Path) -> None:
    record = {"dataset": "".join(HOSTILE), **dict.fromkeys([*HOSTILE, *ORDINARY], 1)}
    append_line(tmp_path / "lines.jsonl", record)
    append_line(tmp_path / "lines.jsonl", record)
    write_json(tmp_path / "file.json", record)
    for file in tmp_path.iterdir():
        assert_tame(file.read_text(encoding="ascii"))
    assert list(read_lines(tmp_path / "lines.jsonl")) == [record, record]
    assert json.loads((tmp_path / "file.json").read_text()) == record


def test_tensorboard_has_a_curve_a_task_whatever_its_name(tmp_path: Path) -> None:
    tasks = [*ORDINARY, "<script>x()</script>", "$x_{$", "a|b"]
    run = Run(tmp_path)
    run.train_metrics.parent.mkdir(parents=True)
    values = dict.fromkeys(tasks, 0.5)
    with opened(Job(run, TRAIN), TrackingSettings()) as sinks:
        writer = MetricsWriter(run, tasks, step=0, steps=1, sinks=sinks)
        writer.log({
            "step": 1, "rows": 10, "lr": 0.1, "loss": 1.0, "weight": values, "ne": values, "task_loss": {},
            "rows_per_s": 1.0, "data_wait": 0.0, "seconds_left": 0.0,
        })  # fmt: skip
        writer.close()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert {f"train_ne/{task}" for task in tasks} <= set(board.Tags()["scalars"])
    assert_tame(run.train_metrics.read_text(encoding="ascii"))
