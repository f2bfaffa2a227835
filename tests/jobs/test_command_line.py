import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from job_calls import assert_one_line

CONF = Path(__file__).parents[2] / "jobs" / "conf"
JOBS = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != "job")


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_three_examples_and_every_setting(job: str, call):
    said = call(job, "--help")
    assert said.count("python -m jobs.") + said.count("torchrun ") >= 3
    settings = yaml.safe_load((CONF / f"{job}.yaml").read_text()).keys() - {"defaults"}
    assert [s for s in settings if f"\n  {s}:" not in said] == []


def test_an_unknown_key_is_named(call):
    assert_one_line(call("train", "dataset=x", "run=y", "train.batchsize=3"), "train.batchsize")


def test_a_missing_setting_is_named(call):
    assert_one_line(call("train", "dataset=x"), "run")


def test_an_unknown_model_lists_those_there_are(call):
    assert_one_line(call("train", "dataset=x", "run=y", "model=adat"), "model/adat", "shared_bottom")


def test_a_value_of_the_wrong_type_is_named(call):
    assert_one_line(call("train", "dataset=x", "run=y", "train.dense.lr=-1"), "train.dense.lr", "greater than 0")


def test_a_text_that_is_read_as_a_number_is_answered_with_what_to_type(call):
    assert_one_line(
        call("train", "dataset=x", "run=y", "days=20261101"),
        "days: 20261101 is no date as YYYY-MM-DD: write 2026-11-01",
    )
    assert_one_line(
        call("generate", "out=x", "start=20261101"), "start: 20261101 is no date as YYYY-MM-DD: write 2026-11-01"
    )
    assert_one_line(call("train", "dataset=2026", "run=y"), "dataset: ", "type 'dataset=\"2026\"'")
    assert_one_line(call("train", 'dataset="2026"', "run=y"), "2026: no dataset")


def test_an_argument_that_a_fusion_does_not_take_is_named(small_dataset: Path, tmp_path: Path, call):
    done = call(
        "train", f"dataset={small_dataset}", f"run={tmp_path / 'run'}", "model=mmoe", "+model.fusion.native=true"
    )
    assert_one_line(done, "model.fusion.native", "mmoe")
    assert not (tmp_path / "run").exists()


def test_interactions_are_a_group_that_any_model_and_recipe_go_with(small_dataset: Path, tmp_path: Path, call):
    assert "interaction=attention|concat|cross|dot" in call("train", "--help")
    start = ["train", f"dataset={small_dataset}", f"run={tmp_path / 'run'}", "model=ple", "recipe=census"]
    assert_one_line(call(*start, "interaction=cros"), "interaction/cros", "attention concat cross dot")
    assert_one_line(call(*start, "interaction=cross", "model.interaction.rank=0"), "model.interaction.rank", "cross")
    assert_one_line(call(*start, "+model.interaction.layers=2"), "model.interaction.layers", "concat")
    assert_one_line(call(*start, "interaction=attention", "model.interaction.heads=3"), "field_dim 16", "multiple of 3")
    assert_one_line(call(*start[:3], "model=autotask", "interaction=dot"), "autotask attends over features", "concat")


def test_a_dataset_of_another_schema_stops_training_with_both_named(small_dataset: Path, tmp_path: Path, call):
    done = call("train", "data=demo", f"dataset={small_dataset}", f"run={tmp_path / 'run'}")
    fingerprint = yaml.safe_load((small_dataset / "manifest.json").read_text())["fingerprint"]
    assert_one_line(done, fingerprint, "the schema of this job")


def test_a_dataset_that_is_not_there_is_said(tmp_path: Path, call):
    assert_one_line(call("train", f"dataset={tmp_path}", f"run={tmp_path / 'run'}"), "no dataset", "jobs.preprocess")


def test_a_label_used_as_a_feature_is_refused(tmp_path: Path, call):
    done = call("preprocess", "data=census", f"out={tmp_path / 'x'}", "+data.schema.categorical.education={}")
    assert_one_line(done, "census.yaml", "tasks.college.label uses column education")


@pytest.mark.system
def test_a_mistake_is_one_line_on_stderr_and_exit_code_1(tmp_path: Path):
    command = [sys.executable, "-m", "jobs.train", f"dataset={tmp_path}", f"run={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.system
def test_under_torchrun_an_error_that_all_ranks_meet_is_said_once(tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "jobs.train"]
    done = subprocess.run([*command, f"dataset={tmp_path}", "run=x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("no dataset (manifest.json is missing)") == 1
