"""jobs.submit: the command line; what a job's own settings, tables and resources are checked for before it is queued."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fake_kubernetes import fake_server, write_kubeconfig
from kubernetes.config import kube_config
from waiting import wait_for

from features.errors import UserError
from jobs import submit
from pipeline.cluster.base import JOBS
from pipeline.cluster.registry import BACKENDS
from pipeline.run.run import Run
from pipeline.submission.records import Records

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CONF = ROOT / "jobs" / "conf"
Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """The command line in this process: what it prints, or the one line that it exits with."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["jobs.submit", *map(str, words)])
        try:
            submit.main()
        except SystemExit as stopped:
            line = str(stopped.code)
            assert "\n" not in line
            return line
        return capsys.readouterr().out

    return run


@pytest.fixture
def train(small_dataset: Path, tmp_path: Path) -> list[str]:
    """Words of a training that can be submitted."""
    return ["train", f"dataset={small_dataset}", "model=shared_bottom", f"run={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: what to submit is missing. The first word is one of train, search"),
        (["trian"], "error: trian: no job and no verb (did you mean train?)"),
        (["status"], "error: the id is missing: python -m jobs.submit status ID"),
        (["status", "follow=true"], "error: the id is missing"),
        (["status", "none"], "error: no submission none in "),
        (["train", "+cluster.environment.U=s3://me:hunter2@host/d"], "error: cluster local: environment.U: a password in"),
        (["resubmit", "x", "nodes=2"], "error: nodes=2: resubmit has no such setting: nodes is of a job, as in"),
        (["stop", "x", "dry_run=true"], "error: dry_run=true: stop has no such setting"),
        (["status", "x", "follow=true"], "error: follow=true: status has no such setting: follow is of logs"),
        (["list", "colour=red"], "error: colour: no such setting"),
        (["train", "cluster=locl"], "error: Could not find 'cluster/locl' (did you mean cluster=local?)"),
        (["train", "cluster.backend=x"], "error: cluster local: backend: x is not one of local, slurm, kubernetes"),
        (["train", "cluster.folder=[1]"], "error: cluster local: folder: "),
        (["train", "+cluster.colour=red"], "error: cluster local: colour: no such setting"),
        (["train", "+cluster.enviroment.A=1"], "error: cluster local: enviroment: no such setting (did you mean environment?)"),
        (["train", "+cluster.jobs.train.cpus=1"], "error: cluster local: jobs.train.cpus: Extra inputs are not permitted"),
        (["train", "cluster.environment.A=1"], "no such setting. See --help; +KEY=VALUE adds a key that a file lacks"),
        (["train", "cluster.gpu_memory=80"], "error: cluster local: gpu_memory: '80' is not bytes of a GPU such as 80GB"),
        (["train", "cluster.gpu_memory=much"], "error: cluster local: gpu_memory: 'much' is not bytes of a GPU such as 80GB"),
        (["train", "+cluster.jobs.trian.cpu=1"], "error: cluster local: jobs.trian is none of train, search"),
        (["train", "nodes=0"], "error: configuration: nodes: 0 is not a number of nodes, or MIN..MAX such as 2..8"),
        (["train", "nodes=8..2"], "error: configuration: nodes: 8..2: the first number is the larger one"),
        (["train", "memory=16GB"], "error: configuration: memory: '16GB' is not a Kubernetes quantity"),
        (["train", "cpu=many"], "error: configuration: cpu: 'many' is not a Kubernetes quantity"),
        # Of the job itself, which is not started for it.
        (["train", "run=R"], "error: dataset is missing: add dataset=VALUE"),
        (["train", "model=adat", "dataset=D", "run=R"], "error: Could not find 'model/adat' (did you mean model=adatt?)"),
        (["train", "dataset=D", "run=R", "train.epoch=3"], "error: train.epoch: no such setting (did you mean train.epochs?)"),
        (["train", "dataset=D", "run=R", "train.epochs=0"], "error: configuration: train.epochs: Input should be greater"),
        (["preprocess", "data=demo"], "error: out is missing"),
        (["train", "dataset=/none", "run=R"], "error: /none: no dataset (manifest.json is missing). Run jobs.preprocess out="),
        (["evaluate"], "error: run is missing"),
        (["nightly", "run=R"], "error: out is missing"),
        # Of each element of an array, which may give what the others' words lack.
        (["evaluate", "array=['run=A','rum=B']"], "error: rum: no such setting"),
        (["evaluate", "array=['run=A','run=B']", "name=My_Job"], "error: name: 'My_Job' is not a DNS label"),
        (["evaluate", "run=R", "nodes=2"], "error: evaluate runs on one node: leave nodes at 1"),
        (["preprocess", "data=demo", "out=O", "gpus_per_node=1"], "error: preprocess uses no GPU"),
        (["train", "dataset=D", "run=R", "gpus_per_node=8", "ranks_per_node=4"], "error: gpus_per_node is 8 and"),
        (["evaluate", "run=R", "name=My_Job"], "error: name: 'My_Job' is not a DNS label"),
        (["evaluate", "run=R", "schedule=daily"], "error: schedule: 'daily' is not a cron schedule"),
        (["evaluate", "run=R", "after=[none]"], "error: no submission none in "),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_and_leaves_nothing(words: list[str], said: str, call: Call, tmp_path: Path) -> None:
    line = call(*words)
    assert said in line
    assert "hunter2" not in line
    assert not (tmp_path / "state").exists()


def test_a_password_in_the_address_of_a_store_is_refused_and_not_printed(call: Call, tmp_path: Path) -> None:
    line = call("evaluate", "run=R", "dataset=s3://me:hunter2@host/d")
    assert line.startswith("error: ")
    assert "dataset" in line
    assert "password" in line
    assert "hunter2" not in line
    assert not (tmp_path / "state").exists()


def test_bad_input_is_exit_code_1_nothing_on_stdout_and_does_not_wait_for_an_import_of_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "jobs.submit", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith("import time:")] == ["error"]
    assert "torch" not in {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "word",
    [
        "out=${oc.env:TASKFUSE_SECRET}",
        "out=\\${oc.env:TASKFUSE_SECRET}",
        "out=${${runner}.env:TASKFUSE_SECRET}",
        "name=${oc.env:TASKFUSE_SECRET}",
        "+cluster.environment.A=${oc.env:TASKFUSE_SECRET}",
    ],
)
def test_the_environment_is_not_written_down(word: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKFUSE_SECRET", "hunter2")
    line = call("preprocess", "data=demo", "dry_run=true", *([] if word.startswith("out") else ["out=/x"]), word)
    assert line.startswith("error: ")
    assert "hunter2" not in line


def test_tables_that_do_not_fit_are_known_before_anything_is_queued(train: list[str], call: Call) -> None:
    words = [*train, "model.tower=[4096]", "gpus_per_node=2"]
    assert call(*words, "cluster.gpu_memory=80GB", "dry_run=true").endswith("\n")
    line = call(*words, "cluster.gpu_memory=2MiB")
    assert line.startswith("error: the ")
    assert "GPU memory" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "not checked: whether tables fit: /data/far is not on this machine"),
        (["days=2026-11-01..2026-11-02"], "not checked: whether tables fit: /data/far is not on this machine"),
        (["data=demo"], "not checked: table item, category, device"),
        (["data=demo", "gpus_per_node=1", "cluster.gpu_memory=80GB"], "not checked: table item, category, device"),
    ],
)
def test_what_cannot_be_checked_here_is_said_and_does_not_stop_a_submission(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["jobs.submit", "train", "dataset=/data/far", "run=/runs/r", "dry_run=true", *words]
    )
    submit.main()
    printed = capsys.readouterr()
    assert said in printed.err
    assert "jobs.train dataset=/data/far run=/runs/r" in printed.out


def test_a_dataset_is_looked_for_where_the_job_will(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"cluster.working_folder={small_dataset.parent}"
    words = ["train", f"dataset={small_dataset.name}", "run=r", "model=shared_bottom", folder, "dry_run=true"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jobs.submit", *words])
    submit.main()
    assert "not checked" not in capsys.readouterr().err


def test_a_dry_run_submits_nothing_and_prints_the_words_of_the_job(
    train: list[str], call: Call, tmp_path: Path
) -> None:
    said = call(*train, "ranks_per_node=2", "dry_run=true", "train.max_steps=3")
    assert said.endswith(f" -m jobs.train {' '.join(train[1:])} train.max_steps=3\n")
    assert "--nproc-per-node=2" in said
    assert not (tmp_path / "state").exists()


def test_words_of_the_job_may_have_the_names_of_the_submissions_own(call: Call, tmp_path: Path) -> None:
    said = call("evaluate", "run=R", "dry_run=true", "--", "memory=2.5")
    assert said.endswith(" -m jobs.evaluate run=R memory=2.5\n")


def test_the_names_that_jobs_share_with_the_submission_are_these() -> None:
    """Each needs a -- before it: no setting is to become another one unnoticed."""
    shared = {}
    for name in JOBS:
        settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        if both := submit.OWN & settings.keys():
            shared[name] = both
    assert shared == {"evaluate": {"memory"}, "nightly": {"memory"}}


@pytest.mark.parametrize("name", JOBS)
def test_every_job_that_can_be_submitted_has_a_file_a_configuration_and_a_check(name: str) -> None:
    assert (ROOT / "jobs" / f"{name}.py").is_file()
    assert (CONF / f"{name}.yaml").is_file()
    assert "def checked(" in (ROOT / "jobs" / f"{name}.py").read_text()


@pytest.mark.parametrize("path", sorted((CONF / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_cluster_has_a_line_for_every_setting_of_its_backend(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    fields = BACKENDS[content["backend"]].model_fields
    assert content.keys() == fields.keys()
    found = BACKENDS[content["backend"]].model_validate(content)
    assert found == BACKENDS[content["backend"]].model_validate({"backend": content["backend"]}), "its defaults"


def test_help_names_every_setting_and_gives_three_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.submit", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    settings = yaml.safe_load((CONF / "submit.yaml").read_text())
    assert done.stdout.partition("Examples:")[2].count("python -m jobs.submit") == 3
    assert [key for key in settings if key != "defaults" and f"{key}: " not in done.stdout] == []
    assert "cluster=k8s|local|slurm" in done.stdout


def test_a_team_adds_a_cluster_in_a_folder_of_its_own(call: Call, train: list[str], tmp_path: Path) -> None:
    (tmp_path / "conf" / "cluster").mkdir(parents=True)
    cluster = {"backend": "local", "jobs": {"train": {"ranks_per_node": 4}}, "environment": {"NCCL_DEBUG": "WARN"}}
    (tmp_path / "conf" / "cluster" / "ours.yaml").write_text(yaml.safe_dump(cluster))
    said = call(*train, f"--config-dir={tmp_path / 'conf'}", "cluster=ours", "dry_run=true")
    assert said.startswith("NCCL_DEBUG=WARN ")
    assert "--nproc-per-node=4" in said
    assert f"-m jobs.train --config-dir={tmp_path / 'conf'} " in said, "the job sees it too"


def test_the_grace_time_follows_from_how_long_the_runs_checkpoints_took(
    train: list[str], call: Call, tmp_path: Path
) -> None:
    assert "--signal=B:TERM@120" in call(*train, "cluster=slurm", "dry_run=true")
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run")
    run.saving_s = 99.5
    run.write_status("preempted", 1, 2)
    assert "--signal=B:TERM@259" in call(*train, "cluster=slurm", "dry_run=true")
    assert "--signal=B:TERM@30" in call(*train, "cluster=slurm", "dry_run=true", "grace_s=30")


def test_a_submission_to_kubernetes_is_recorded_with_its_namespace_and_forgotten_if_refused(
    train: list[str], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    words = [*train, "cluster=k8s", "cluster.image=registry.example/taskfuse@sha256:" + "0123456789abcdef" * 4]
    with fake_server() as server:
        config = write_kubeconfig(tmp_path, server.server_port)
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))  # read from KUBECONFIG on import
        assert call(*words, "name=run-7") == "run-7\n"
        assert Records(None).read("run-7").native == "ml/run-7"
        assert Records(None).read("run-7").settings["image"] == words[-1].partition("=")[2]
        server.refuse["Job"] = (403, "jobs is forbidden")
        assert "jobs is forbidden" in call(*words, "name=run-8", f"run={tmp_path / 'another'}")
        assert Records(None).names() == ["run-7"]


def test_the_base_is_kubernetes_own(call: Call, tmp_path: Path) -> None:
    assert call("base", tmp_path / "base") == f"wrote {tmp_path / 'base'}: kubectl apply -k {tmp_path / 'base'}\n"
    assert (tmp_path / "base" / "train.yaml").read_text() == (ROOT / "k8s" / "base" / "train.yaml").read_text()
    assert "cluster=local is not Kubernetes" in call("base", tmp_path / "b", "cluster=local")
    assert "the folder is missing: python -m jobs.submit base FOLDER" in call("base")


def test_who_stops_following_a_log_is_told_that_the_job_goes_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Records, "read", lambda *_: None)
    monkeypatch.setattr(submit.manager, "logs", interrupted)
    assert call("logs", "x", "follow=true") == "x goes on: jobs.submit status x, jobs.submit stop x"


@pytest.mark.system
def test_a_training_is_submitted_followed_stopped_and_submitted_again(
    train: list[str], call: Call, tmp_path: Path
) -> None:
    settings = [
        "train.batch_size=8",
        "train.lanes=2",
        "train.checkpoint_every=1",
        "train.log_every=1",
        "train.epochs=100000",
    ]
    first = call(*train, *settings, "name=first").strip()
    assert first == "first"
    wait_for(lambda: "checkpoint" in call("status", first))
    assert [line.split()[:4] for line in call("list").splitlines()[1:]] == [["first", "train", "local", "running"]]
    assert "is running: stop it first" in call("resubmit", first)
    assert call("stop", first) == "stopped first\n"
    said = call("status", first)
    assert "stopped: exit code 75" in said
    assert "preempted" in said
    stopped_at = step(said)
    second = call("resubmit", first).strip()
    assert second == "first-2"
    wait_for(lambda: step(call("status", second)) > stopped_at)
    assert f"resumed from {tmp_path / 'run'}" in call("logs", second)
    call("stop", second)
    assert "a submission first exists" in call(*train, "name=first")


def step(said: str) -> int:
    found = next((line for line in said.splitlines() if line.startswith("step ")), "step 0 ")
    return int(found.split()[1].replace(",", ""))


def test_the_command_line_is_split_by_whom_words_are_for() -> None:
    words = submit.split(
        ["train", "nodes=2", "cluster.queue=a", "model=ple", "--config-dir=C", "+x=1", "--", "nodes=3", "--", "y"]
    )
    assert words == submit.Words(
        "train",
        "",
        ["--config-dir=C", "nodes=2", "cluster.queue=a"],
        ["model=ple", "+x=1", "nodes=3", "--", "y"],
        [Path("C")],
    )
    with pytest.raises(UserError, match="no job and no verb"):
        submit.split([f"cluster={os.sep}"])
