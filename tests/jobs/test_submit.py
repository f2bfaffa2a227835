"""jobs.submit: the real command line, a real subprocess, and a real client against an API server of our own."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_kubernetes import FakeServer, fake_server, write_kubeconfig
from kubernetes.config import kube_config

from jobs.submit import main, quoted

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
IMAGE = "image=registry.example/taskfuse@sha256:" + "0123456789abcdef" * 4


def submit(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line as a person runs it; proxies of this machine do not stand before 127.0.0.1."""
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "KUBECONFIG"}
    command = [sys.executable, "-m", "jobs.submit", *words]
    environment = inherited | {"PYTHONPATH": str(ROOT), "HOME": str(cwd)} | env
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def call(monkeypatch: pytest.MonkeyPatch, *words: str, kubeconfig: Path = Path("none")) -> None:
    """The same within this process, where nothing but the exit code differs."""
    monkeypatch.setattr(sys, "argv", ["submit", *map(quoted, words)])
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))  # read from KUBECONFIG on import
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    main()


def refused(monkeypatch: pytest.MonkeyPatch, *words: str, kubeconfig: Path = Path("none")) -> str:
    """The one line that a refusal says."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *words, kubeconfig=kubeconfig)
    line = str(stop.value.code)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["job=foo"], "job: Input should be 'train', 'preprocess' or 'nightly'"),
        (["cluster=bar"], "cluster: bar is not one of local, k8s"),
        (["nodes=0"], "nodes: Input should be greater than or equal to 1"),
        (["nodes=2"], "cluster=local is one node"),
        (["cluster=k8s", "name=My_Job"], "name: 'My_Job' is not a DNS label"),
        (["cluster=k8s", f"name={'a' * 53}"], "at most 52 characters"),
        (["cluster=k8s"], "image=taskfuse:0.1.0 is a tag, which a push can move to another image"),
        (["cluster=k8s", "image='a b'"], "image: 'a b' is not an image"),
        (["cluster=k8s", "job=nightly", "schedule='0 24 * * *'"], "hour '24' is none of *, 0-23"),
        (["cluster=k8s", "egress=[10.0.0.1/8]"], "egress.0: '10.0.0.1/8' is not a network"),
        (["cluster=k8s", "+secrets.A=b"], "secrets.A: 'b' is not SECRET/KEY"),
        (["cluster=k8s", "+secrets.HOME=b/c"], "secrets.HOME: the pods set HOME themselves"),
        (["cluster=k8s", "memory=16GB"], "memory: '16GB' is not a Kubernetes quantity"),
        (["cluster=k8s", "job=nightly", "schedule=daily"], "schedule: 'daily' is not a cron schedule"),
        (["cluster=k8s", "ranks_per_node=8", "gpus_per_node=4"], "gpus_per_node is 4 and ranks_per_node 8"),
        (["cluster=k8s", "job=preprocess", "nodes=2"], "preprocess is one process"),
        (["args=[data]"], "args.0: 'data' is not KEY=VALUE"),
        (["+colour=red"], "colour: Extra inputs are not permitted"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said in refused(monkeypatch, "dry_run=true", *words)


@pytest.mark.parametrize(
    "word",
    [
        "args=['out=${oc.env:TASKFUSE_SECRET}']",
        "args=['out=\\${oc.env:TASKFUSE_SECRET}']",
        "args=['out=${${cluster}.env:TASKFUSE_SECRET}']",
        "args=['out=${oc.decode:${oc.env:TASKFUSE_SECRET}}']",
        "args='${oc.decode:${oc.env:TASKFUSE_SECRET}}'",
        "name=${oc.env:TASKFUSE_SECRET}",
        "+secrets.A=${oc.env:TASKFUSE_SECRET}/key",
    ],
)
def test_the_environment_is_not_written_into_a_job(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASKFUSE_SECRET", "hunter2")
    said = refused(monkeypatch, "job=preprocess", "cluster=k8s", "allow_tag=true", "dry_run=true", word)
    assert "hunter2" not in said + "".join(capsys.readouterr())
    assert "would write a secret into the Job: give it by reference, +secrets.NAME=SECRET/KEY" in said


def test_a_secret_by_reference_and_keys_of_the_submission_itself_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["job=preprocess", "cluster=k8s", "allow_tag=true", "dry_run=true", "+secrets.KEY=logs/id"]
    call(monkeypatch, *words, "args=['out=/data/${name}','date=\\${now:%Y}']")
    (container,) = list(yaml.safe_load_all(capsys.readouterr().out))[-1]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["out=/data/taskfuse-preprocess", "date=$${now:%Y}"], "which Kubernetes makes ${now:%Y}"
    assert {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "logs", "key": "id"}}} in container["env"]


def test_bad_input_is_exit_code_1_and_nothing_on_stdout() -> None:
    done = submit("job=foo")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("args=[data=demo,dataset=/data/x,model=adatt]", "args=['data=demo','dataset=/data/x','model=adatt']"),
        ("args=[ a=1, b=x y,c=]", "args=['a=1','b=x y','c=']"),
        ("args=[hidden=[64,32],+seed=7]", "args=['hidden=[64,32]','+seed=7']"),
        ("args=['a=1',\"b={x:1,y:2}\"]", "args=['a=1',\"b={x:1,y:2}\"]"),
        ("args=[]", "args=[]"),
        ("image=a=b", "image=a=b"),
    ],
)
def test_arguments_need_no_quotes_of_their_own(word: str, read: str) -> None:
    assert quoted(word).replace(", '", ",'").replace("[ '", "['") == read


def test_help_names_every_key_and_gives_three_examples() -> None:
    done = submit("--help")
    settings = yaml.safe_load((ROOT / "jobs" / "conf" / "submit.yaml").read_text())
    assert done.returncode == 0
    assert done.stdout.count("python -m jobs.submit") == 3
    assert [key for key in settings if key != "defaults" and f"{key}: " not in done.stdout] == []


FAKE_TRAIN = """
import os, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
open(f"rank-{dist.get_rank()}", "w").write(f"{int(total)} {sys.argv[1:]}")
dist.destroy_process_group()
"""


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder where jobs.train and jobs.nightly are stand-ins and the rest of jobs is real."""
    (tmp_path / "jobs").mkdir()
    for path in (ROOT / "jobs").glob("*.py"):
        shutil.copy(path, tmp_path / "jobs" / path.name)
    shutil.copytree(ROOT / "jobs" / "conf", tmp_path / "jobs" / "conf")
    (tmp_path / "jobs" / "nightly.py").write_text("import sys; print(sys.argv[1:]); sys.exit(2)\n")
    (tmp_path / "jobs" / "train.py").write_text(FAKE_TRAIN)
    return tmp_path


def test_a_local_job_gets_its_arguments_and_its_exit_code_comes_through(fakes: Path) -> None:
    done = submit("job=nightly", "args=[data=demo,against=a b]", cwd=fakes)
    command, said = done.stdout.splitlines()
    assert done.returncode == 2, "2 says: worse than allowed"
    assert command == f"{sys.executable} -m jobs.nightly data=demo 'against=a b'"
    assert said == "['data=demo', 'against=a b']"


def test_a_dry_run_on_this_machine_runs_nothing(fakes: Path) -> None:
    done = submit("job=nightly", "dry_run=true", cwd=fakes)
    assert (done.returncode, done.stdout) == (0, f"{sys.executable} -m jobs.nightly\n")


def test_local_training_has_the_ranks_of_ranks_per_node(fakes: Path) -> None:
    done = submit("job=train", "ranks_per_node=2", "args=[data=demo]", cwd=fakes)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in fakes.glob("rank-*")) == ["rank-0", "rank-1"]
    assert (fakes / "rank-1").read_text() == "2 ['data=demo']"


@pytest.mark.system
def test_the_commands_of_two_pods_meet_and_train_together(fakes: Path) -> None:
    done = submit("cluster=k8s", "allow_tag=true", "nodes=2", "dry_run=true", "args=[data=demo]", cwd=fakes)
    *_, job = yaml.safe_load_all(done.stdout)
    container = job["spec"]["template"]["spec"]["containers"][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pods = []
    for index in (1, 0):  # the one that has to wait first
        expand = {"$(JOB_COMPLETION_INDEX)": str(index), "$(JOB_NAME)-0.$(JOB_NAME)": "127.0.0.1", "29500": str(port)}
        line = "\n".join(container["command"][1:] + container["args"])
        for before, after in expand.items():
            line = line.replace(before, after)
        command = [sys.executable, "-m", "torch.distributed.run", *line.split("\n")]
        pods.append(subprocess.Popen(command, cwd=fakes))
    assert [pod.wait(timeout=120) for pod in pods] == [0, 0]
    assert (fakes / "rank-1").read_text() == "2 ['data=demo']"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


def test_train_is_submitted_policy_first_into_the_namespace_of_the_context(server: FakeServer, tmp_path: Path) -> None:
    words = ["cluster=k8s", IMAGE, "nodes=2", "name=run-7", "args=[data=demo]"]
    done = submit(*words, KUBECONFIG=str(write_kubeconfig(tmp_path, server.server_port)))
    assert done.returncode == 0, done.stderr
    assert [(verb, path) for verb, path, _ in server.seen] == [
        ("GET", "/apis/batch/v1/namespaces/ml/jobs/run-7"),
        ("POST", "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies"),
        ("POST", "/api/v1/namespaces/ml/services"),
        ("POST", "/apis/batch/v1/namespaces/ml/jobs"),
    ]
    assert [body for _, _, body in server.seen[1:]] == list(yaml.safe_load_all(submit(*words, "dry_run=true").stdout))
    assert done.stdout.startswith(
        "created NetworkPolicy, Service and Job run-7 in namespace ml; follow it with: kubectl logs -f "
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_nightly_is_submitted_into_the_namespace_it_is_given(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_kubeconfig(tmp_path, server.server_port)
    call(monkeypatch, "job=nightly", "cluster=k8s", IMAGE, "namespace=prod", kubeconfig=config)
    (_, path, body) = server.seen[-1]
    assert (path, body["kind"]) == ("/apis/batch/v1/namespaces/prod/cronjobs", "CronJob")
    assert (
        "created NetworkPolicy and CronJob taskfuse-nightly in namespace prod; follow it with: kubectl get jobs"
        in capsys.readouterr().out
    )


def test_a_name_that_is_taken_meanwhile_is_one_line_and_leaves_nothing_behind(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuse["Job"] = (409, 'jobs.batch "taskfuse-train" already exists')
    line = refused(monkeypatch, "cluster=k8s", IMAGE, kubeconfig=write_kubeconfig(tmp_path, server.server_port))
    assert 'jobs.batch "taskfuse-train" already exists. Choose another name=, or delete it: kubectl' in line
    assert [(verb, path) for verb, path, _ in server.seen[-2:]] == [
        ("DELETE", "/api/v1/namespaces/ml/services/taskfuse-train"),
        ("DELETE", "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies/taskfuse-train"),
    ]


def test_a_service_that_was_there_before_is_left_alone(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuse["Service"] = (403, "services is forbidden")
    line = refused(monkeypatch, "cluster=k8s", IMAGE, kubeconfig=write_kubeconfig(tmp_path, server.server_port))
    assert line == "error: Service taskfuse-train in namespace ml: the cluster refuses: services is forbidden"
    assert "/api/v1/namespaces/ml/services/taskfuse-train" not in [path for _, path, _ in server.seen]
    assert server.seen[-1][:2] == (
        "DELETE",
        "/apis/networking.k8s.io/v1/namespaces/ml/networkpolicies/taskfuse-train",
    )


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        done = submit("cluster=k8s", IMAGE, KUBECONFIG=str(write_kubeconfig(tmp_path, closed.getsockname()[1])))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "does not answer" in done.stderr


@pytest.mark.parametrize("content", [None, "{not yaml", "{}", "[]", "contexts: 3\ncurrent-context: x"])
def test_a_missing_or_broken_kubeconfig_is_one_line(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    assert refused(monkeypatch, "cluster=k8s", IMAGE, kubeconfig=path).startswith("error: no usable kubeconfig (")
