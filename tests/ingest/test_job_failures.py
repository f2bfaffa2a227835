"""What stops the ingest job: one line that says what to do, exit code 1, and nothing left behind."""

import gzip
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ingest_runs import ENVIRONMENT, SPLITS, refused, run, write_conf
from pydantic import ValidationError

from features.errors import UserError
from features.parse import raw
from jobs.preprocess import main
from pipeline.dataset.dataset import Dataset
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.formats import FORMATS, text

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]


# Logs that cannot be read


def cut(path: Path, copies: int = 1) -> None:
    """Leaves three quarters of a gzip file, whose rows may be repeated first."""
    header, _, body = gzip.decompress(path.read_bytes()).partition(b"\n")
    data = gzip.compress(header + b"\n" + body * copies, 1)
    path.write_bytes(data[: len(data) * 3 // 4])


def replaced(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


FAULTS: dict[str, tuple[Any, list[str]]] = {
    "a cut gzip file": (lambda f: cut(f / "impressions-2.csv.gz"), ["impressions-2.csv.gz: cannot be read"]),
    "a long cut gzip file": (
        lambda f: cut(f / "impressions-2.csv.gz", 100), ["impressions-2.csv.gz: cannot be read to its end"],
    ),
    "a gzip file that is none": (
        replaced("impressions-2.csv.gz", "id,at\n1,2\n"), ["impressions-2.csv.gz: is not gzip: rename it to"],
    ),
    "a missing column": (
        replaced("impressions-3.csv", "id,at\n1,2\n"),
        ["impressions-3.csv lacks column price (found: id, at), which the other 2 files of the stream have: "],
    ),
    "an empty file": (replaced("impressions-3.csv", ""), ["impressions-3.csv: is empty"]),
    "no impressions": (lambda f: [p.unlink() for p in f.glob("impressions*")], ["impressions-*: no such file"]),
    "no outcomes": (lambda f: [p.unlink() for p in f.glob("clicks*")], ["clicks-*.csv: no such file"]),
    "an outcome's missing column": (replaced("clicks-2.csv", "id\n1\n"), ["clicks-2.csv", "dwell"]),
    "an outcome's bad lines": (
        replaced("clicks-2.csv", "id,dwell\n1,2\n1\n1,x\n"),
        ["2 of 254 rows of click are bad", "clicks-2.csv, line 3: ", "max_bad_fraction=0.001"],
    ),
    "bytes that are no text": (
        lambda f: (f / "impressions-1.csv").write_bytes((f / "impressions-1.csv").read_bytes() + b"\xff" + b",1" * 8 + b"\n"),
        ["1 of 901 rows of impressions are bad", "impressions-1.csv, line 302: not UTF-8", "max_bad_fraction=0.001"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_log_that_cannot_be_read_stops_the_job_in_one_line(fault, small_log, small_content, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 14)
    folder = shutil.copytree(small_log, tmp_path / "log")
    spoil, says = FAULTS[fault]
    spoil(folder)
    message = refused(folder, tmp_path / "out", small_content())
    assert [words for words in says if words not in message] == []


def test_the_first_bad_row_is_named_by_its_line_in_the_file_though_it_is_in_a_later_unit(
    small_log, small_content, tmp_path
):
    folder = shutil.copytree(small_log, tmp_path / "log")
    lines = (folder / "impressions-1.csv").read_text().splitlines()
    lines.insert(211, "1,2")
    (folder / "impressions-1.csv").write_text("\n".join(lines) + "\n")
    message = refused(folder, tmp_path / "out", small_content(), unit_bytes=1000, max_bad_fraction=0)
    assert message.startswith("1 of 901 rows of impressions are bad, more than max_bad_fraction=0.0; the first: ")
    assert "impressions-1.csv, line 212: 2 columns instead of 9. Fix the log" in message


@pytest.mark.parametrize("name", ["impressions-1.csv", "impressions-2.csv.gz", "clicks-2.csv"])
def test_a_file_that_changes_while_it_is_read_is_named(name, small_log, small_content, tmp_path, monkeypatch):
    folder = shutil.copytree(small_log, tmp_path / "log")
    real, added = raw.type_columns, [gzip.compress(b"1,2\n") if name.endswith(".gz") else b"1,2\n"]

    def type_and_append(*arguments: Any) -> raw.Typed:
        with (folder / name).open("ab") as file:
            file.write(added.pop() if added else b"")
        return real(*arguments)

    monkeypatch.setattr(raw, "type_columns", type_and_append)
    message = refused(folder, tmp_path / "out", small_content())
    assert message.endswith(f"{folder}/{name} changed while it was read. Run again once nobody writes to it.")


def test_a_file_that_vanishes_before_it_is_read_is_named(small_log, small_content, tmp_path, monkeypatch):
    folder = shutil.copytree(small_log, tmp_path / "log")
    monkeypatch.setattr("pipeline.ingest.job._reference", lambda *_: (folder / "clicks-1.csv").unlink() or (None, True))
    assert f"{folder}/clicks-1.csv" in refused(folder, tmp_path / "out", small_content())


# Settings and schemas that cannot work


def test_a_split_without_rows_stops_the_job(small_log, small_content, tmp_path):
    content = small_content() | {"split": {"by": "time", "valid_from": "1970-01-02", "test_from": "1970-02-01"}}
    assert "split test is empty: none of 900 rows" in refused(small_log, tmp_path / "out", content)


def test_a_log_of_which_no_row_is_left_stops_the_job(small_dataset, small_log, small_content, tmp_path):
    folder = shutil.copytree(small_log, tmp_path / "log")
    for path in folder.glob("impressions*"):
        path.unlink()
    (folder / "impressions-1.csv").write_text((small_log / "impressions-1.csv").read_text().partition("\n")[0] + "\n")
    reference = {"from": small_dataset}
    message = refused(folder, tmp_path / "out", small_content(), encoders=reference, max_bad_fraction=1)
    assert message.startswith("no rows are left: the files are empty")
    assert refused(folder, tmp_path / "out", small_content()) == message  # and where new ones would have to be fitted


def test_an_expression_that_does_not_fit_the_columns_stops_the_job(small_log, small_content, tmp_path):
    content = small_content()
    content["weight"] = "city + 1"
    assert "weight: 'city + 1' cannot be computed" in refused(small_log, tmp_path / "out", content)


@pytest.mark.parametrize("expression", ["city", "price / 7"])
def test_a_derived_time_that_is_no_whole_number_stops_the_job(expression, small_log, small_content, tmp_path):
    content = small_content() | {"event_time": "moment", "split": {"by": "hash", "key": "user", "valid": 0, "test": 0}}
    content["source"]["derived"] = {"moment": expression}
    content["source"]["outcomes"]["click"] |= {"time": "dwell", "columns": {}, "window": 5}
    content["source"]["times"] = {"dwell": "index"}
    content["tasks"] = {"click": {"kind": "binary", "label": "click"}}
    message = refused(small_log, tmp_path / "out", content, max_bad_fraction=0.1)
    assert "event_time: column moment is" in message
    assert "it must be a whole number: make it CAST(FLOOR(...) AS BIGINT) in source.derived.moment" in message


def test_a_format_that_is_not_registered_is_refused_with_its_key_and_those_that_are(small_log, small_content, tmp_path):
    content = small_content()
    content["source"]["outcomes"]["click"]["read"] = {"format": "orc"}
    message = refused(small_log, tmp_path / "out", content)
    known = ", ".join(FORMATS)
    assert message == f"source.outcomes.click.read.format: 'orc' is not a raw format. Use one of {known}."
    content["source"]["format"] = "avor"
    assert refused(small_log, tmp_path / "out", content).startswith("source.format: 'avor' is not a raw format.")


@pytest.mark.parametrize(
    "setting",
    [
        {"rows_per_shard": 0},
        {"rows_per_row_group": 0},
        {"workers": 0},
        {"unit_bytes": 0},
        {"bucket_bytes": 0},
        {"max_bad_fraction": 2},
        {"max_bad_fraction": -1},
        {"order": "random"},
        {"as_of": "yesterday"},
        {"date": "2024-13-01"},
        {"encoders": {"form": "x"}},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        PreprocessConfig(input="x", out=Path("y"), **setting)


def test_an_out_that_cannot_be_written_is_refused(small_log, small_content, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/out cannot be written"):
        run(small_log, tmp_path / "file" / "out", small_content())


def test_a_bad_stream_stops_the_job_however_many_good_rows_another_has(small_log, small_content, tmp_path):
    """Of 302 clicks two are bad: within the limit among all 1202 rows, and not among the clicks."""
    folder = shutil.copytree(small_log, tmp_path / "log")
    clicks = (folder / "clicks-1.csv").read_text().splitlines()
    clicks[7], clicks[3] = "no number,1", "short"
    (folder / "clicks-1.csv").write_text("\n".join(clicks) + "\n")
    message = refused(folder, tmp_path / "out", small_content(), max_bad_fraction=2 / 303)
    assert message.startswith("2 of 302 rows of click are bad, more than max_bad_fraction=0.0066")
    assert f"the first: {folder}/clicks-1.csv, line 4: 1 columns instead of 2. Fix" in message
    manifest = run(folder, tmp_path / "out", small_content(), max_bad_fraction=2 / 302)
    assert sum(manifest.dead_letters.values()) == 2


@pytest.mark.parametrize("unit_bytes", [1000, 1 << 20])
def test_the_example_is_the_earliest_bad_line_whichever_step_finds_it(unit_bytes, small_log, small_content, tmp_path):
    """A label is seen to be bad only after the join, long after a value that is no number."""
    folder = shutil.copytree(small_log, tmp_path / "log")
    lines = (folder / "impressions-1.csv").read_text().splitlines()
    lines[30], lines[45] = (
        lines[30].replace(",", ",,", 1),
        lines[45].replace(",1.5,", ",oops,").replace(",20,", ",oops,"),
    )
    lines[20] = lines[20].rpartition(",")[0] + ",9"
    (folder / "impressions-1.csv").write_text("\n".join(lines) + "\n")
    content = small_content()
    content["tasks"]["few"] = {"kind": "binary", "label": "qty / 8"}
    message = refused(folder, tmp_path / "out", content, unit_bytes=unit_bytes)
    assert "3 of 900 rows of impressions are bad" in message
    assert f"the first: {folder}/impressions-1.csv, line 21: tasks.few: " in message


def test_a_raw_column_with_a_name_that_the_schema_adds_is_refused(small_log, small_content, tmp_path):
    """Else a label would be read from the file or from the join, and nobody could tell."""
    for name in ("click", "click_count", "click_dwell", "hour"):
        folder = shutil.copytree(small_log, tmp_path / name / "log")
        lines = (folder / "impressions-3.csv").read_text().splitlines()
        (folder / "impressions-3.csv").write_text("\n".join([lines[0] + f',"{name}"', *(x + ",1" for x in lines[1:])]))
        content = small_content()
        content["source"]["derived"] = {"hour": "at % 24"}
        message = refused(folder, tmp_path / name / "out", content)
        assert message.startswith(f"{folder}/impressions-3.csv: column {name} is also what the schema adds: rename")


def test_an_order_in_time_needs_a_time(small_log, small_content, tmp_path):
    content = small_content() | {"split": {"by": "hash", "key": "user", "valid": 0.3, "test": 0.3}}
    del content["event_time"], content["source"]["times"]
    assert "order=time: the schema has no event_time" in refused(small_log, tmp_path / "out", content, order="time")
    assert run(small_log, tmp_path / "out", content).read["impressions"] == 900


@pytest.mark.parametrize("key", ["out", "scratch"])
def test_a_url_of_no_storage_or_with_a_password_is_refused_before_a_folder_of_its_name_appears(
    key, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for url, why in {"ftp://host/data": "is no storage", "s3://me:secret@bucket/data": "has a password, a key"}.items():
        with pytest.raises(ValidationError, match=why):
            PreprocessConfig.model_validate({"input": "x", "out": "data", key: url})
    assert not list(tmp_path.iterdir())


# The command line


@pytest.fixture
def conf(small_content, tmp_path) -> Path:
    """A --config-dir with the data groups `small` and `broken`."""
    broken = small_content()
    broken["dense"]["qty"] = {}
    return write_conf(tmp_path / "conf", small=small_content(), broken=broken)


def test_a_cut_file_ends_the_command_with_one_line_and_exit_code_1(conf, small_log, tmp_path):
    folder = shutil.copytree(small_log, tmp_path / "log")
    cut(folder / "impressions-2.csv.gz", 100)
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "jobs.preprocess", f"--config-dir={conf}"]
    command += ["data=small", f"input={folder}", f"out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line and "read  " not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {folder}/impressions-2.csv.gz: cannot be read")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["data=broken", "out=out"],
            "broken.yaml: tasks.bought.label uses column qty, which is also read by the feature qty",
        ),
        (["data=small", "out=out"], "nowhere/impressions-*: no such file"),
        (["data=small"], "out"),
        (["out=out"], "data is missing"),
        (["data=nosuch", "out=out"], "nosuch"),
        (["data=small", "out=out", "rows_per_shard=0"], "rows_per_shard"),
        (["data=small", "out=out", "colour=blue"], "colour"),
        (["data=small", "out=ftp://host/data"], "out: "),
        (["data=small", "out=out", "encoders.from=nosuch"], "no such file"),
    ],
)
def test_a_command_that_cannot_work_exits_with_one_line(arguments, says, conf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["preprocess", f"--config-dir={conf}", *arguments])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith("error: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_it_wrote(conf, small_log, tmp_path, monkeypatch, capsys):
    folder, out = shutil.copytree(small_log, tmp_path / "log"), tmp_path / "out"
    with (folder / "clicks-2.csv").open("a") as file:
        file.write("no number,1\n")
    monkeypatch.chdir(tmp_path)
    arguments = [f"--config-dir={conf}", "data=small", f"input={folder}", f"out={out}", "max_bad_fraction=0.02"]
    monkeypatch.setattr(sys, "argv", ["preprocess", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [[split, "300", "rows"] for split in SPLITS]
    assert "click 0.3333 of 300, bought 0.5000 of 100" in lines[0]
    assert lines[3:5] == [
        "impressions: 900 rows read, 900 in splits, 0 bad",
        "click: 303 rows read, 301 joined, 0 early, 0 late, 1 unmatched, 0 duplicate, 1 bad",
    ]
    assert lines[5].split()[:2] == ["bad", "1"]
    assert lines[5].endswith("id: wrong value; the first: clicks-2.csv, line 53: id: 'no number' is not an integer")
    assert f"schema {Dataset(out).manifest.fingerprint}" in lines[-2]
    assert lines[-1] == f"next   python -m jobs.inspect {out}   then   python -m jobs.train dataset={out}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conf", "log", "out"]
    asked = [*arguments[:3], f"out={tmp_path / 'asked'}", f"encoders.from={out}", "labels=none"]
    monkeypatch.setattr(sys, "argv", ["preprocess", *asked])
    main()
    assert capsys.readouterr().out.splitlines()[-1] == f"next   python -m jobs.inspect {tmp_path / 'asked'}"
