"""Kubernetes: the cluster that a person's kubeconfig, or the pod this runs in, points at."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kubernetes import client, config
from urllib3.exceptions import HTTPError

from features.errors import UserError
from features.printable import printable
from pipeline.cluster.base import Cluster, State, Status, Workload
from pipeline.cluster.kubernetes_manifests import INSTANCE, KubeObject, objects, to_yaml
from pipeline.cluster.values import is_pinned

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_S = 30  # of one request
POLL_S = 2.0  # between two looks at whether pods have ended
POD_END_S = 60  # that the cluster may take to delete pods, beyond their grace period
# A Job's condition to the state of its workload.
CONDITIONS: dict[str, State] = {"Complete": "succeeded", "Failed": "failed", "Suspended": "suspended"}


# Kinds to the API that has them, and their name in its methods.
METHODS = {
    "NetworkPolicy": ("networking", "network_policy"),
    "Service": ("core", "service"),
    "Job": ("batch", "job"),
    "CronJob": ("batch", "cron_job"),
}


class _Connection(NamedTuple):
    """Clients of one cluster, and the namespace of a workload there."""

    core: client.CoreV1Api
    batch: client.BatchV1Api
    networking: client.NetworkingV1Api
    namespace: str
    host: str

    def call(self, verb: str, kind: str, *arguments: Any, **options: Any) -> Any:
        """What e.g. `create_namespaced_job` of `kind`'s API returns."""
        api, name = METHODS[kind]
        method = getattr(getattr(self, api), f"{verb}_namespaced_{name}")
        return method(*arguments, _request_timeout=TIMEOUT_S, **options)

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such an object."""
        try:
            self.call("read", kind, name, self.namespace)
        except client.ApiException as error:
            if error.status != 404:
                raise
            return False
        return True


class Kubernetes(Cluster):
    """train is an Indexed Job with a headless Service, preprocess a Job, nightly a CronJob; each has a NetworkPolicy."""

    def render(self, work: Workload) -> str:
        """Manifests that `kubectl apply -f -` takes. Raises UserError where the image is not one for good."""
        return to_yaml(_submitted(work))

    def submit(self, work: Workload) -> str:
        """Creates the objects of the workload, all of them or none; the Job last, so that it never runs without the others.

        A NetworkPolicy or Service whose Job was deleted, as it is `ttl_s` after its end, is replaced.
        """
        parts = _submitted(work)
        to, main = _connect(work), str(parts[-1].kind)
        kinds = [str(part.kind) for part in parts]
        with _refusals(to, main, work.name):
            taken = to.has(main, work.name)
        if taken:
            delete = f"kubectl delete -n {to.namespace} {','.join(kinds).lower()} {work.name}"
            raise UserError(
                f"{main} {work.name} in namespace {to.namespace} exists. Choose another name=, or delete it: {delete}"
            )
        made: list[str] = []
        for kind, part in zip(kinds, parts, strict=True):
            try:
                with _refusals(to, kind, work.name):
                    if _create(to, work, kind, part, replace=kind != main):
                        made.append(kind)
            except UserError:
                _roll_back(to, made, main, work.name)
                raise
        verb = "get jobs" if work.job == "nightly" else f"logs -f --prefix --max-log-requests={work.nodes}"
        selected = f"-n {to.namespace} -l {INSTANCE}={work.name}"
        listed = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
        return f"created {listed} {work.name} in namespace {to.namespace}; follow it with: kubectl {verb} {selected}"

    def status(self, work: Workload) -> Status:
        """State of the Job, or for nightly of its CronJob: running while one of its Jobs is."""
        to = _connect(work)
        if work.job == "nightly":
            with _refusals(to, "CronJob", work.name):
                cron = to.batch.read_namespaced_cron_job_status(work.name, to.namespace, _request_timeout=TIMEOUT_S)
            return _cron_status(cron.spec, cron.status or client.V1CronJobStatus())
        with _refusals(to, "Job", work.name):
            found = to.batch.read_namespaced_job_status(work.name, to.namespace, _request_timeout=TIMEOUT_S)
        return _job_status(found.status or client.V1JobStatus())

    def logs(self, work: Workload) -> Iterator[str]:
        """Lines of every pod that has started, pod by pod in the order of their names, without control characters."""
        to = _connect(work)
        started = [
            pod.metadata for pod in _pods(to, work) if pod.metadata and pod.status and pod.status.phase != "Pending"
        ]
        for name in sorted(str(metadata.name) for metadata in started):
            with _refusals(to, "pod", name):
                text = to.core.read_namespaced_pod_log(name, to.namespace, _request_timeout=TIMEOUT_S)
            yield from (f"{name}: {printable(line)}" for line in text.replace("\t", " ").splitlines())

    def stop(self, work: Workload) -> None:
        """Deletes what there is of the workload, waits for its pods, which get SIGTERM, and deletes their NetworkPolicy last.

        Raises:
            UserError: there is nothing of it, or its pods outlast `grace_s` by a minute; the NetworkPolicy then stays.
        """
        to = _connect(work)
        missing: list[client.ApiException] = []
        kinds = [str(part.kind) for part in objects(work)]
        for kind in reversed(kinds):  # the Job before the Service that its pods meet through
            if kind == "NetworkPolicy":
                _wait_for_pods_to_go(to, work)
            with _refusals(to, kind, work.name):
                try:
                    to.call("delete", kind, work.name, to.namespace, propagation_policy="Background")
                except client.ApiException as error:
                    if error.status != 404:
                        raise
                    missing.append(error)
        if len(missing) == len(kinds):
            with _refusals(to, kinds[-1], work.name):
                raise missing[0]


def _submitted(work: Workload) -> list[KubeObject]:
    """The objects of a workload. Raises UserError where its image may be another one by the time a pod starts."""
    if not (work.allow_tag or is_pinned(work.image)):
        raise UserError(
            f"image={work.image} is a tag, which a push can move to another image: give NAME@sha256:DIGEST, as "
            "docker push prints it (k8s/README.md), or set allow_tag=true"
        )
    return objects(work)


def _create(to: _Connection, work: Workload, kind: str, part: KubeObject, *, replace: bool) -> bool:
    """Creates an object; with `replace`, puts it in the place of one that an earlier workload of this name left.

    Returns:
        Whether it was created.
    """
    try:
        to.call("create", kind, to.namespace, part)
    except client.ApiException as error:
        if error.status != 409 or not replace:
            raise
        left = to.call("read", kind, work.name, to.namespace).metadata
        assert part.metadata is not None
        if left is None or left.labels != part.metadata.labels:
            raise error from None
        to.call("replace", kind, work.name, to.namespace, part)
        return False
    return True


def _roll_back(to: _Connection, made: list[str], main: str, name: str) -> None:
    """Deletes what was created, unless the Job is there after all: its pods must not run without their NetworkPolicy."""
    with suppress(client.ApiException, HTTPError):
        if not to.has(main, name):
            for kind in reversed(made):
                to.call("delete", kind, name, to.namespace)


def _pods(to: _Connection, work: Workload) -> list[client.V1Pod]:
    selector = f"{INSTANCE}={work.name}"
    with _refusals(to, "pods of", work.name):
        found = to.core.list_namespaced_pod(to.namespace, label_selector=selector, _request_timeout=TIMEOUT_S)
    return list(found.items)


def _wait_for_pods_to_go(to: _Connection, work: Workload) -> None:
    until = time.monotonic() + work.grace_s + POD_END_S
    while pods := _pods(to, work):
        if time.monotonic() > until:
            raise UserError(
                f"{len(pods)} pods of {work.name} in namespace {to.namespace} have not ended; their NetworkPolicy stays. "
                f"Once they have: kubectl delete -n {to.namespace} networkpolicy {work.name}"
            )
        time.sleep(POLL_S)


def _job_status(found: client.V1JobStatus) -> Status:
    for condition in found.conditions or []:
        if condition.status == "True" and condition.type in CONDITIONS:
            return Status(CONDITIONS[condition.type], condition.message or condition.type)
    active, ready = found.active or 0, found.ready or 0
    counts = f"pods: {ready} ready of {active} active, {found.succeeded or 0} succeeded, {found.failed or 0} failed"
    return Status("running" if ready else "pending", counts)


def _cron_status(spec: client.V1CronJobSpec, found: client.V1CronJobStatus) -> Status:
    state: State = "suspended" if spec.suspend else "running" if found.active else "pending"
    return Status(state, f"schedule {spec.schedule} UTC, last started {found.last_schedule_time or 'never'}")


def _connect(work: Workload) -> _Connection:
    """Clients for the current context, or for the cluster this runs in."""
    try:
        config.load_kube_config()
        namespace = config.list_kube_config_contexts()[1]["context"].get("namespace", "default")
    except (config.ConfigException, yaml.YAMLError, OSError, TypeError, LookupError, AttributeError) as outside:
        # The client does not check what a kubeconfig looks like before it walks through it.
        try:
            config.load_incluster_config()
            namespace = NAMESPACE_FILE.read_text().strip()
        except (config.ConfigException, OSError):
            raise UserError(
                f"no usable kubeconfig ({str(outside).rstrip('.')}): set KUBECONFIG to a file with a context "
                "(kubectl config get-contexts lists them), or print the manifests with dry_run=true"
            ) from None
    settings = client.Configuration.get_default_copy()
    settings.retries = False  # urllib3 would log each retry: a cluster that does not answer is one line
    api = client.ApiClient(settings)
    return _Connection(
        client.CoreV1Api(api), client.BatchV1Api(api), client.NetworkingV1Api(api),
        work.namespace or namespace, settings.host,
    )  # fmt: skip


@contextmanager
def _refusals(to: _Connection, kind: str, name: str) -> Iterator[None]:
    """Turns a request that fails into a UserError of one line."""
    try:
        yield
    except HTTPError as error:
        raise UserError(
            f"{kind} {name}: the cluster at {to.host} does not answer ({error}). Check the context and the network."
        ) from None
    except client.ApiException as error:
        try:
            reason = json.loads(error.body or "")["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"{error.status} {error.reason}"
        line = f"{kind} {name} in namespace {to.namespace}: the cluster refuses: {reason}"
        if error.status == 409:
            delete = f"kubectl delete -n {to.namespace} {kind.lower()} {name}"
            line += f". Choose another name=, or delete it: {delete}"
        raise UserError(line) from None
