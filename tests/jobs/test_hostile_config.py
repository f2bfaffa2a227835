"""Configuration that was handed over: a folder for --config-dir, and words of a command line that somebody sent along.

An attack would create the file PROOF; its good twin is a file of a user's own, which still counts.
"""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hostile_pickle import Payload
from job_calls import Call, assert_one_line
from omegaconf import OmegaConf

from features.errors import UserError
from jobs import command_line
from jobs.entry import environment
from pipeline.overrides import setting

ROOT = Path(__file__).parents[2]
TRAIN = ("dataset=nowhere", "run=nowhere")
SCHEMA = yaml.safe_load((ROOT / "jobs" / "conf" / "data" / "demo.yaml").read_text())["schema"]


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "PROOF"


def conf(folder: Path, **files: str | bytes) -> str:
    """A --config-dir; group__name=text is the file group/name.yaml."""
    for name, text in files.items():
        path = folder / "conf" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"--config-dir={folder / 'conf'}"


def logging_to(proof: Path) -> str:
    """Hydra's own settings that create a file, in the same way in which others would run a function."""
    handlers = {"file": {"class": "logging.FileHandler", "filename": str(proof)}}
    logs = {"version": 1, "handlers": handlers, "root": {"handlers": ["file"], "level": "INFO"}}
    return yaml.safe_dump({"hydra": {"job_logging": logs, "job": {"env_set": {"PYTHONPATH": "/evil"}}}})


@pytest.mark.parametrize("group", ["data", "model", "recipe", "interaction"])
@pytest.mark.parametrize(
    "header",
    [
        "",
        "# @package _global_\n",
        "\n  ##@package   _global_\n",
        "# @package _global_\r\n",
        "\ufeff# @package _global_\n",
    ],
)
def test_settings_of_hydra_in_a_file_of_a_group_are_refused(
    group, header, call: Call, proof: Path, tmp_path: Path
) -> None:
    said = call("train", conf(tmp_path, **{f"{group}__evil": header + logging_to(proof)}), f"{group}=evil", *TRAIN)
    assert_one_line(said, f"{group}/evil.yaml: ")
    assert "hydra" in said or "@package" in said
    assert not proof.exists()
    assert "PYTHONPATH" not in os.environ or os.environ["PYTHONPATH"] != "/evil"


@pytest.mark.parametrize(
    "line", ["# @package hydra", "# @package hydra.job", "# @package _global_", "# @package model", "# @x y z"]
)
@pytest.mark.parametrize("before", ["", "# @package model.interaction\n", "a: 1\n"])
def test_a_file_is_put_nowhere_else_by_a_package_line(line, before, call: Call, tmp_path: Path) -> None:
    said = call("train", conf(tmp_path, interaction__evil=f"{before}{line}\nname: dot\n"), "interaction=evil", *TRAIN)
    assert_one_line(said, "interaction/evil.yaml: ", line, "only # @package model.interaction")


@pytest.mark.parametrize(
    "defaults",
    [
        "[/hydra/job_logging@hydra.job_logging: default]", "[override /hydra/launcher: x]", "[/data/demo]", "[../data/demo]",
        "[{/recipe: demo}]", "[demo@hydra.job]", "['${x}']", "[census, demo]", "demo", "{a: b}", "[evil]", "[[demo]]", "[5]",
    ],
)  # fmt: skip
def test_defaults_reach_no_other_group(defaults: str, call: Call, tmp_path: Path) -> None:
    said = call("preprocess", conf(tmp_path, data__evil=f"defaults: {defaults}\ninput: x\n"), "data=evil", "out=out")
    assert_one_line(said, "data/evil.yaml: defaults")


def test_files_made_from_each_other_are_refused(call: Call, tmp_path: Path) -> None:
    circle = conf(tmp_path, data__a="defaults: [b]\n", data__b="defaults: [c]\n", data__c="defaults: [a]\n")
    assert_one_line(call("preprocess", circle, "data=a", "out=out"), "defaults:", "is made from itself")


@pytest.mark.parametrize(
    "place", ["evil", "train", "job", "hydra/launcher/evil", "hydra/job_logging/evil", "recipes/evil", "hydra/config"]
)
def test_files_outside_the_groups_are_refused(place: str, call: Call, proof: Path, tmp_path: Path) -> None:
    said = call("train", conf(tmp_path, **{place.replace("/", "__"): logging_to(proof)}), *TRAIN)
    assert_one_line(said, f"{place}.yaml: ", "data, model, interaction, recipe")


@pytest.mark.parametrize(
    "text",
    [
        "input: ${oc.env:HOME}", "input: ${oc.decode:${oc.env:HOME}}", "truth: {file: '${oc.create:{a: 1}}'}",
        "input: ${hydra:job.name}",
        "input: ${${x}:HOME}", "schema: {weight: '${oc.env:SECRET}'}", "schema: {tasks: ['${ oc.env:HOME}']}",
        "input: \\${x${y}}",
    ],
)  # fmt: skip
def test_a_file_reads_no_environment(text: str, call: Call, tmp_path: Path) -> None:
    said = call("preprocess", conf(tmp_path, data__evil=text), "data=evil", "out=out")
    assert_one_line(said, "data/evil.yaml: ", "refer to another key")


def test_references_that_double_each_other_are_refused(call: Call, tmp_path: Path) -> None:
    bomb = "".join(f"a{n}: ${{.a{n + 1}}}${{.a{n + 1}}}\n" for n in range(40)) + "a40: x\n"
    trees = "".join(f"a{n}: {{x: '${{data.a{n + 1}}}', y: '${{data.a{n + 1}}}'}}\n" for n in range(40)) + "a40: x\n"
    for name, text in {"text": bomb, "tree": trees}.items():
        folder = conf(tmp_path, **{f"data__{name}": text})
        assert_one_line(call("preprocess", folder, f"data={name}", "out=out"), " references", "more than 12")
        assert_one_line(call("preprocess", folder, f"data={name}", "out=out", "--cfg=job", "--resolve"), "--resolve")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"input: \xff", "line 1 is not UTF-8"),
        ("input: [", "not YAML"),
        ("- a", "holds no keys"),
        ("a: &x [y]\nb: *x", "anchors"),
        ("a: " + "[" * 3000, "nested more than"),
        ("a: " + "9" * 5000, "a number of more than"),
        ("1: x", "evil.yaml: a key that YAML reads as the number 1: put it into quotes"),
        ("null: x", "evil.yaml: a key that YAML reads as null, such as ~: put it into quotes"),
        (
            "schema: {u: {on: x}}",
            "evil.yaml: schema.u: a key that YAML reads as true, such as on or yes: put it into quotes",
        ),
        ("no: x", "evil.yaml: a key that YAML reads as false, such as off or no: put it into quotes"),
        ("2026-11-01: x", "evil.yaml: a key that YAML reads as the time 2026-11-01: put it into quotes"),
        ("input: x\ninput: y", "twice"),
        ("input: x\nschema: 5", "schema is missing"),
        ("input: x\nschema:", "schema is missing"),
        ("", "schema is missing"),
        ('input: "a\\0b"\nschema: {source: {files: x}}', "zero byte"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(text: str | bytes, says: str, call: Call, tmp_path: Path) -> None:
    assert_one_line(
        call("preprocess", conf(tmp_path, data__evil=text), "data=evil", "out=out"),
        "evil.yaml" * (says != "zero byte"),
        says,
    )


def test_links_pipes_and_endless_folders_do_not_hang(call: Call, tmp_path: Path) -> None:
    folder = conf(tmp_path, data__fine="input: x\n")
    (tmp_path / "conf" / "model").mkdir()
    os.mkfifo(tmp_path / "conf" / "model" / "pipe.yaml")
    assert_one_line(call("train", folder, *TRAIN), "pipe.yaml is not a regular file")
    (tmp_path / "conf" / "model" / "pipe.yaml").unlink()
    (tmp_path / "conf" / "model" / "zero.yaml").symlink_to("/dev/zero")
    assert_one_line(call("train", folder, *TRAIN), "zero.yaml is not a regular file")
    (tmp_path / "conf" / "model" / "zero.yaml").unlink()
    (tmp_path / "conf" / "model" / "big.yaml").write_bytes(b"#" * (5 << 20))
    assert_one_line(call("train", folder, *TRAIN), "big.yaml", "more than 4,194,304 bytes")
    (tmp_path / "conf" / "model" / "big.yaml").unlink()
    (tmp_path / "conf" / "model" / "up").symlink_to(tmp_path / "conf")
    assert_one_line(call("train", folder, *TRAIN), "folders more than 8 deep")


# Words of a command line


@pytest.mark.parametrize(
    "words",
    [
        ["--experimental-rerun=PICKLE"], ["--experimental-rerun", "PICKLE"], ["--experimental-r=PICKLE"],
        ["--config-path=CONF"],
        ["--config-path", "CONF"], ["-cp", "CONF"], ["-cp=CONF"], ["--config-name=evil"], ["-cn", "evil"], ["--config-n=evil"],
        ["--config-d=CONF"], ["--", "x=y"], ["hydra.searchpath=[file://CONF]"], ["+hydra.searchpath=[file://CONF]"],
        ["++hydra.searchpath=[CONF]"], ["+data@hydra.job_logging=demo"], ["data@_global_=demo"],
        ["hydra/job_logging=../../data/demo"], ["+hydra=../evil"], ["data=../evil"], ["data=.hidden/evil"], ["+data=[../evil]"],
        ["data=/evil"], ["data='../evil'"], ["data=${oc.env:HOME}"],
    ],
)  # fmt: skip
def test_words_that_would_read_other_files_are_refused(
    words: list[str], call: Call, proof: Path, tmp_path: Path
) -> None:
    (tmp_path / "pickle").write_bytes(pickle.dumps(Payload(proof)))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "evil.yaml").write_text(logging_to(proof))
    places = {"PICKLE": str(tmp_path / "pickle"), "CONF": str(tmp_path / "outside")}
    for before, after in places.items():
        words = [word.replace(before, after) for word in words]
    assert_one_line(call("train", *TRAIN, *words), words[0].split("=")[0])
    assert not proof.exists()


@pytest.mark.parametrize(
    "word", ["x=" + "[" * 3000 + "]" * 3000, "x=" + "{a:" * 200 + "1" + "}" * 200, "+" + "a." * 3000 + "a=1"]
)
def test_a_word_nested_too_deeply_is_one_line(word: str, call: Call) -> None:
    assert_one_line(call("train", *TRAIN, word), "nested more than 40 deep")


def test_a_word_that_is_not_utf8_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"/data/\xff")
    assert_one_line(call("train", "dataset=x", f"run={name}"), "run=/data/\\udcff is not UTF-8")
    assert_one_line(call("train", f"--config-dir={name}", *TRAIN), "is not UTF-8")
    from jobs.inspect import main

    with pytest.raises(SystemExit, match=r"^error: .*is not UTF-8"):
        main([name])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=[x"], "run=[x: "), (["run={a"], "type 'run=\"{a\"'"), (["run=a,b"], "'run=\"a,b\"'"), (["run=[x]"], "run: "),
        (["run=null"], "run: "),
        (["model=null"], "the command line cannot be read"), (["hydra=null"], "the command line cannot be read"),
        (["log_level=null"], "log_level"), (["log_level=loud"], "debug, info, warning, error"),
        (["run=${run}"], "Recursive"), (["run=${nope:x}"], "nope"),
        (["--nope"], "--nope"), (["--config-dir"], "--config-dir=DIR"),
        ([""], "not KEY=VALUE"),
        (["train=5"], "train"), (["model.fusion=[]"], "model.fusion"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_user_is_one_line(words: list[str], says: str, call: Call) -> None:
    assert_one_line(call("train", *TRAIN, *words), says)


def test_a_name_that_the_file_system_does_not_take_is_one_line(call: Call, tmp_path: Path) -> None:
    assert_one_line(call("preprocess", "data=demo", "input=nowhere", "out=" + "y" * 5000), "File name too long")
    (tmp_path / "file").touch()
    said = call("preprocess", "data=demo", "input=nowhere", "out=file/x")
    assert_one_line(said)


def test_secrets_of_the_environment_are_not_written_down(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cr3t")
    for word in ("out=${oc.env:SECRET}", "start=${oc.env:SECRET,x}", "out=${oc.decode:${oc.env:SECRET}}"):
        said = call("generate", "out=x", word)
        assert_one_line(said)
        assert "s3cr3t" not in said
    said = call("preprocess", "data=demo", "out=x", "+data.schema.weight=${oc.env:SECRET}")
    assert_one_line(said, "demo.yaml: schema: weight: ", "refer to another key")
    for word in (
        "out=${oc.env:SECRET}",
        "out=${oc.decode:x}",
        "out=${hydra:job.name}",
        "cluster.image=${oc.env:SECRET}",
        "cluster.environment={A: '${oc.env:SECRET}'}",
    ):
        said = call("submit", "preprocess", "data=demo", "out=x", "cluster=k8s", "dry_run=true", word)
        assert_one_line(said)
        assert "s3cr3t" not in said
    words = ("preprocess", "data=demo", "cluster=k8s", "dry_run=true", "cluster.allow_tag=true", "out=/data/${seed}")
    assert "- out=/data/$${seed}" in call("submit", *words), "as it was typed: Kubernetes reads $$ as $"


def test_the_variable_of_jobs_conf_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment("TASKFUSE_DATA", "x") == os.environ.get("TASKFUSE_DATA", "x")
    monkeypatch.setenv("TASKFUSE_DATA", "/logs")
    assert environment("TASKFUSE_DATA", "x") == "/logs"
    monkeypatch.delenv("TASKFUSE_DATA")
    assert environment("TASKFUSE_DATA", "x") == "x"
    for name in ("TASKFUSE_DATA", "TASKFUSE_SECRET", "HOME"):
        with pytest.raises(UserError, match=name):
            environment(name)


# The good twins


def printed(said: str) -> Any:
    return OmegaConf.create(said)


def test_files_of_ones_own_fill_the_groups(call: Call, tmp_path: Path) -> None:
    folder = conf(
        tmp_path,
        data__mine=yaml.safe_dump({"input": "/logs", "truth": {"file": "${..input}/truth.parquet"}, "schema": SCHEMA}),
        data__later="# days later\ndefaults:\n  - mine\n  - _self_\ninput: /later\n",
        model__wide="defaults: [mmoe]\ntower: [512]\n",
        recipe__mine="# @package _global_\nmodel: {dropout: 0.1}\ntrain: {epochs: 3}\n",
        interaction__mine="# @package model.interaction\nname: cross\nlayers: 5\nrank: null\n",
        recipe__half="# @package _global_\ndefaults: [mine]\ntrain: {window: 4}\n",
    )
    found = printed(
        call("train", folder, "--cfg", "job", "data=later", "model=wide", "recipe=half", "interaction=mine", *TRAIN)
    )
    assert (found.data.input, found.data.truth.file) == ("/later", "/later/truth.parquet")
    assert (found.model.tower, found.model.fusion.name, found.model.dropout) == ([512], "mmoe", 0.1)
    assert (found.train.epochs, found.train.window, found.model.interaction.layers) == (3, 4, 5)
    said = call("preprocess", folder, "data=mine", "out=out")
    assert_one_line(said, "/logs/impressions-{date}.csv: no such file")
    again = call("train", "--cfg", "job", "--config-dir", tmp_path / "conf", "model=wide", *TRAIN)
    assert printed(again).model.tower == [512]


def test_a_mounted_config_map_is_read(call: Call, tmp_path: Path) -> None:
    version = tmp_path / "conf" / "model" / "..2026_11_28"
    version.mkdir(parents=True)
    (version / "wide.yaml").write_text("defaults: [mmoe]\ntower: [512]\n")
    (version.parent / "..data").symlink_to(version.name)
    (version.parent / "wide.yaml").symlink_to("..data/wide.yaml")
    (tmp_path / "conf" / "README.md").write_text("not a configuration")
    found = printed(call("train", f"--config-dir={tmp_path / 'conf'}", "--cfg", "job", "model=wide", *TRAIN))
    assert found.model.tower == [512]


def test_the_words_of_a_usual_command_line_are_accepted() -> None:
    command_line.check(
        ["data=demo", "out=../runs/x", "input='runs/[x]'", "hydra.run.dir=.", "+data.schema.weight='a.b + 1'", "recipe=null",
         "model=ple,mmoe", "--multirun", "~interaction", "+train.keep={last: 2}", "hydra/launcher=joblib",
         "model=glob(*)", "-c", "all", "--cfg", "job",
         "date=${now:%Y-%m-%d}", "folder=runs/${hydra:runtime.choices.data}", "--package", "model"]
    )  # fmt: skip


def test_our_own_configuration_stands_by_the_rules() -> None:
    for group in command_line.GROUPS:
        assert list((ROOT / "jobs" / "conf" / group).glob("*.yaml"))
    assert sorted(command_line.GROUPS) == sorted(p.name for p in (ROOT / "jobs" / "conf").iterdir() if p.is_dir())


@pytest.mark.system
def test_a_handed_folder_runs_nothing_in_workers(proof: Path, small_log: Path, tmp_path: Path) -> None:
    """The attack in full: a PYTHONPATH for two worker processes, in which Python would import sitecustomize."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "sitecustomize.py").write_text(f"open({str(proof)!r}, 'w')")
    env_set = {"hydra": {"job": {"env_set": {"PYTHONPATH": f"{tmp_path / 'evil'}:{ROOT}"}}}}
    content = yaml.safe_dump({"data": {"input": str(small_log), "schema": SCHEMA}, **env_set})
    folder = conf(tmp_path, data__evil="# @package _global_\n" + content)
    command = [sys.executable, "-m", "jobs.preprocess", folder, "data=evil", f"out={tmp_path / 'out'}", "workers=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "data/evil.yaml" in done.stderr
    assert not proof.exists()


@pytest.mark.system
def test_folders_with_signs_of_patterns_in_their_names_work(
    small_log: Path, small_content, call: Call, tmp_path: Path
) -> None:
    folder = tmp_path / "a [x]*? {y} 'q' ü"
    log = shutil.copytree(small_log, folder / "log")
    mine = conf(tmp_path, data__mine=yaml.safe_dump({"input": str(log), "schema": small_content()}))
    said = call("preprocess", mine, "data=mine", setting("out", folder / "data"), "order=input")
    assert "300 rows" in said
    words = ("model=mmoe", "train.batch_size=64", "train.lanes=4", "train.max_steps=2")
    call("train", setting("dataset", folder / "data"), setting("run", folder / "run"), *words)
    truth = pl.DataFrame({"id": range(1000, 1900), "p": [0.3] * 900})
    truth.write_parquet(folder / "truth [1].parquet")
    of = ("+truth.key=id", "+truth.columns={click: p, bought: p, dwell: p}")
    said = call(
        "evaluate",
        setting("run", folder / "run"),
        setting("+truth.file", folder / "truth [1].parquet"),
        *of,
        "predictions=true",
    )
    assert "step 2  test  NE " in said
    assert (folder / "run" / "report.html").exists()


@pytest.mark.integration
def test_files_whose_names_are_not_utf8_are_read(small_log: Path, small_content, call: Call, tmp_path: Path) -> None:
    log = shutil.copytree(small_log, tmp_path / "log")
    odd = os.fsencode(str(log)) + b"/clicks-\xff.csv"
    Path(os.fsdecode(odd)).write_text("id,dwell\n1001,nonsense\n")
    mine = conf(tmp_path, data__mine=yaml.safe_dump({"input": str(log), "schema": small_content()}))
    said = call("preprocess", mine, "data=mine", "out=out", "order=input", "max_bad_fraction=0.1")
    assert ", 1 bad" in said
    said.encode()  # what a terminal does
    Path(os.fsdecode(odd)).write_text("id,seconds\n1001,2\n")
    assert_one_line(call("preprocess", mine, "data=mine", "out=other"), "column dwell")
