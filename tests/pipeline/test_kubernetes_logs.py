"""Logs of pods against an API server of our own: those so far, and followed through lost connections and late pods."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kubernetes import DROPPED, PODS, FakeServer, current_cluster
from k8s_manifests import cluster, workload
from waiting import wait_for

from features.errors import UserError
from pipeline.cluster.kubernetes import api, logs

K8S = cluster()
RUN = workload(name="run-7", nodes=4, ranks_per_node=2)
JOB = "/apis/batch/v1/namespaces/ml/jobs/run-7"
RUNNING = {"kind": "Job", "status": {"active": 1, "ready": 1}}
COMPLETE = {"kind": "Job", "status": {"conditions": [{"type": "Complete", "status": "True"}]}}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(logs, "RETRY_S", 0.02)
    monkeypatch.setattr(api, "LONGEST_WAIT_S", 0.02)
    with current_cluster(tmp_path, monkeypatch) as fake:
        yield fake


def wait_for_readers_to_end() -> None:
    def ended() -> bool:
        return not any(thread.name.startswith(("pods", "run-7")) for thread in threading.enumerate())

    wait_for(ended, "the end of threads that read logs", 10)


def pod(name: str, phase: str) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"name": name, "resourceVersion": "7"}, "status": {"phase": phase}}


def pods(**phases: str) -> dict[str, Any]:
    items = [pod(f"run-7-{name}", phase) for name, phase in phases.items()]
    return {"kind": "PodList", "metadata": {"resourceVersion": "5"}, "items": items}


def event(kind: str, content: dict[str, Any]) -> str:
    return api.json.dumps({"type": kind, "object": content})


def lines(*texts: str, then: Callable[[], None] = lambda: None) -> Callable[[], Iterator[str]]:
    """A stream of log lines, `S.F text` with a second and a fraction, which does something before it ends."""

    def stream() -> Iterator[str]:
        for text in texts:
            at, _, rest = text.partition(" ")
            yield f"2026-11-29T10:00:0{at}Z {rest}"
        then()

    return stream


def test_logs_are_those_of_the_workload_by_pod_without_the_ones_that_have_not_started(server: FakeServer) -> None:
    server.found[PODS] = pods(**{"1-x": "Running", "0-y": "Failed", "2-z": "Pending"})
    server.found[f"{PODS}/run-7-0-y/log"] = "step 1\nerror: Zürich's disk is full\n"
    server.found[f"{PODS}/run-7-1-x/log"] = "step 1\n"
    found = list(K8S.logs(RUN, "ml/run-7", None, follow=False))
    assert found == ["run-7-0-y: step 1", "run-7-0-y: error: Zürich's disk is full", "run-7-1-x: step 1"]
    assert server.seen[0][1].endswith("labelSelector=app.kubernetes.io/instance=run-7")


def test_a_rank_has_the_lines_that_name_it_of_the_pod_of_its_node(server: FakeServer) -> None:
    server.found[PODS] = pods(**{"2-a": "Running"})
    server.found[f"{PODS}/run-7-2-a/log"] = "10:00:00  rank 5  step 1\n10:00:00  rank 4  step 1\nerror (rank 5): full\n"
    found = list(K8S.logs(RUN, "ml/run-7", 5, follow=False))
    assert found == ["run-7-2-a: 10:00:00  rank 5  step 1", "run-7-2-a: error (rank 5): full"]
    assert server.seen[0][1].endswith("instance=run-7,batch.kubernetes.io/job-completion-index=2")
    with pytest.raises(UserError, match="rank=8: run-7 has ranks 0 to 7"):
        list(K8S.logs(RUN, "ml/run-7", 8, follow=False))


def test_the_rank_of_an_elastic_node_is_looked_for_in_all_pods(server: FakeServer) -> None:
    server.found[PODS] = pods(**{"0-a": "Running"})
    server.found[f"{PODS}/run-7-0-a/log"] = "10:00:00  rank 5  step 1\n"
    work = workload(name="run-7", nodes="1..4", ranks_per_node=2)
    assert list(K8S.logs(work, "ml/run-7", 5, follow=False)) == ["run-7-0-a: 10:00:00  rank 5  step 1"]


def test_followed_logs_go_on_through_lost_connections_to_the_end_each_line_once(server: FakeServer) -> None:
    server.found[JOB] = [RUNNING, RUNNING, COMPLETE]
    server.found[PODS] = [pods(a="Running"), pods(a="Running", b="Running"), pods(a="Succeeded", b="Succeeded")]
    server.found[f"{PODS}/run-7-a"] = [pod("run-7-a", "Running")] * 3 + [pod("run-7-a", "Succeeded")]
    server.found[f"{PODS}/run-7-b"] = pod("run-7-b", "Succeeded")
    server.streams[f"{PODS}/run-7-a/log"] = [
        lines("1.9 step 1", "1.95 step 2"),
        lines("1.95 step 2", "1.951 step 3", "2.1 \x1b[31mstep\t4"),
        lines(),
        lines("2.1 \x1b[31mstep\t4", "2.5 done"),
    ]
    server.streams[f"{PODS}/run-7-b/log"] = [lines("1.0 of another pod")]
    found = list(K8S.logs(RUN, "ml/run-7", None, follow=True))
    first = [line for line in found if line.startswith("run-7-a")]
    assert first == [f"run-7-a: {text}" for text in ("step 1", "step 2", "step 3", r"\x1b[31mstep 4", "done")]
    assert [line for line in found if line not in first] == ["run-7-b: of another pod"]


def test_a_pod_that_starts_while_others_are_followed_is_followed_too(server: FakeServer) -> None:
    server.found[JOB] = [RUNNING, COMPLETE]
    server.found[PODS] = [pods(), pods(late="Succeeded")]
    server.found[f"{PODS}/run-7-late"] = pod("run-7-late", "Succeeded")
    server.streams[PODS] = [lambda: iter([event("ADDED", pod("run-7-late", "Running"))])]
    server.streams[f"{PODS}/run-7-late/log"] = [lines("1.0 here")]
    assert list(K8S.logs(RUN, "ml/run-7", None, follow=True)) == ["run-7-late: here"]
    (watched, *_) = [path for _, path, _ in server.seen if "watch=" in path]
    assert "resourceVersion=5" in watched
    assert "labelSelector=app.kubernetes.io/instance=run-7" in watched


@pytest.mark.parametrize(
    "trouble",
    [
        lambda server: server.streams.update({PODS: [lambda: iter([event("ERROR", GONE)])] * 2}),
        lambda server: server.streams.update({PODS: [lambda: iter(["{half a line"])]}),
        lambda server: server.streams.update({PODS: [lambda: iter(['{"type": "ADDED"}'])]}),
        lambda server: server.failures.update(
            {("GET", f"{PODS}/run-7-a/log"): [(429, {}), (500, {}), DROPPED, (400, {})]}
        ),
        lambda server: server.failures.update({("GET", JOB): [(429, {}), (503, {}), DROPPED]}),
        lambda server: server.failures.update({("GET", JOB): [DROPPED] * 9, ("GET", f"{PODS}/run-7-a"): [DROPPED] * 9}),
    ],
    ids=[
        "410 of a watch",
        "half an event",
        "an event of nothing",
        "log refused for now",
        "status refused for now",
        "out of reach",
    ],
)
def test_trouble_that_passes_costs_no_line(trouble: Callable[[FakeServer], Any], server: FakeServer) -> None:
    server.found[JOB] = [RUNNING, RUNNING, COMPLETE]
    server.found[PODS] = [pods(), pods(a="Running"), pods(a="Succeeded")]
    server.found[f"{PODS}/run-7-a"] = pod("run-7-a", "Succeeded")
    server.streams[f"{PODS}/run-7-a/log"] = [lines("1.0 one", "1.5 two")]
    trouble(server)
    assert list(K8S.logs(RUN, "ml/run-7", None, follow=True)) == ["run-7-a: one", "run-7-a: two"]


GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}


@pytest.mark.parametrize("path", [f"{PODS}/run-7-a/log", f"{PODS}/run-7-a", PODS, JOB])
def test_a_refusal_that_stays_ends_the_logs_in_one_line(path: str, server: FakeServer) -> None:
    server.found[JOB] = RUNNING
    server.found[PODS] = pods(a="Running")
    server.found[f"{PODS}/run-7-a"] = pod("run-7-a", "Running")
    server.failures["GET", path] = [(403, {})] * 99
    with pytest.raises(UserError, match="in namespace ml: the cluster refuses: failure 403") as caught:
        list(K8S.logs(RUN, "ml/run-7", None, follow=True))
    assert "\n" not in str(caught.value)


def test_a_cluster_that_stays_out_of_reach_ends_the_logs_in_one_line(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOST", 2)
    server.failures["GET", JOB] = [DROPPED] * 99
    with pytest.raises(UserError, match=r"the cluster at .* does not answer"):
        list(K8S.logs(RUN, "ml/run-7", None, follow=True))
    assert len(server.seen) == 3 * api.TRIES


def test_a_log_that_ends_over_and_over_while_its_pod_runs_ends_in_one_line(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOST", 3)
    server.found[JOB] = RUNNING
    server.found[PODS] = pods(a="Running")
    server.found[f"{PODS}/run-7-a"] = pod("run-7-a", "Running")
    with pytest.raises(UserError, match="pod run-7-a: its log ends although it runs"):
        list(K8S.logs(RUN, "ml/run-7", None, follow=True))
    assert len([path for _, path, _ in server.seen if "/log" in path]) == 4


def test_whoever_stops_reading_stops_what_reads_for_him(server: FakeServer) -> None:
    server.found[JOB] = RUNNING
    server.found[PODS] = pods(a="Running")
    server.found[f"{PODS}/run-7-a"] = pod("run-7-a", "Running")
    server.streams[f"{PODS}/run-7-a/log"] = [lines("1.0 one", "1.5 two")]
    found = K8S.logs(RUN, "ml/run-7", None, follow=True)
    assert next(iter(found)) == "run-7-a: one"
    found.close()  # type: ignore[attr-defined]
    wait_for_readers_to_end()
