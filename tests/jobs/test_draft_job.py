import shlex
from pathlib import Path

import yaml
from job_calls import assert_one_line

from jobs import draft


def write_log(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = [f"u{i % 37},{i % 5},{i * 7 % 11 / 4},{'- 50000.' if i % 4 else '50000+.'}" for i in range(400)]
    (folder / "log.csv").write_text("\n".join(lines))


def test_the_command_that_is_printed_runs_on_what_was_written(tmp_path: Path, call) -> None:
    write_log(tmp_path / "raw logs")
    start = ["draft", f"input={tmp_path / 'raw logs'}", "out=my conf/data/mine.yaml"]
    assert_one_line(call(*start), "no label was found", "\"label=c4 = '50000+.'\"")
    assert not (tmp_path / "my conf").exists()
    said = call(*start, "label=c4 = '50000+.'")
    assert "label        c4: c4 = '50000+.' (binary)" in said
    python, flag, module, *words = shlex.split(said.splitlines()[-1])
    assert (python, flag, module) == ("python", "-m", "jobs.preprocess")
    printed = call("preprocess", *words)
    assert "runs/mine: 3 shards" in printed
    assert ", 0 bad" in printed
    assert "mean label: c4 0.2" in printed
    assert_one_line(call(*start, "label=c4 = '50000+.'"), "overwrite=true")


def test_patterns_are_given_as_the_help_writes_them(tmp_path: Path, call) -> None:
    """Those without {date} as the settings' comment has them, those with it as the example in the docstring."""
    conf = Path(draft.__file__).with_name("conf") / "draft.yaml"
    plain = next(word for word in conf.read_text().split() if word.startswith("files=")).rstrip(";")
    [dated] = [
        word for line in (draft.__doc__ or "").splitlines() if "{date}" in line for word in shlex.split(line)[4:5]
    ]
    for day in ("", "-2026-11-07", "-2026-11-08"):
        rows = "".join(f"{i},{i % 3},{i % 2}\n" for i in range(60))
        (tmp_path / f"imp{day}.csv").write_text(f"id,item,label\n{rows}")
        (tmp_path / f"clk{day}.csv").write_text("id,at\n1,2\n7,5\n")
    for number, (word, files) in enumerate({plain: "imp.csv", dated: "imp-{date}.csv"}.items()):
        call("draft", f"input={tmp_path}", word, f"out=conf/data/mine{number}.yaml")
        found = yaml.safe_load(Path(f"conf/data/mine{number}.yaml").read_text())
        assert found["schema"]["source"]["files"] == files


def test_a_folder_without_logs_is_one_line(tmp_path: Path, call) -> None:
    (tmp_path / "raw").mkdir()
    assert_one_line(call("draft", "input=raw", "out=my/data/x.yaml"), "no file that may be a log")
    (tmp_path / "raw" / "README.md").write_text("x")
    (tmp_path / "raw" / "a.bin").write_bytes(b"a\0b")
    assert_one_line(call("draft", "input=raw", "out=my/data/x.yaml"), "a.bin is binary")
    assert_one_line(call("draft", "input=raw", "out=my/x.yaml"), "DIR/data/NAME.yaml")
