"""The API of a cluster: a connection by kubeconfig, requests that are repeated where that is right, errors in one line."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from kubernetes import client, config
from urllib3.exceptions import HTTPError, ProtocolError

from features.errors import UserError, one_line
from pipeline.cluster.kubernetes.settings import KubernetesSettings

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT_S = 30  # of one request
TRIES, LONGEST_WAIT_S = 4, 30  # of a request that may be repeated, and between two of them
UNAVAILABLE = (500, 502, 503, 504)
BUSY = 429  # refused before anything was done
# Kinds to the API that has them and their name in its methods, or for those without a type to version and plural.
METHODS = {
    "NetworkPolicy": ("networking", "network_policy"),
    "ServiceAccount": ("core", "service_account"),
    "ConfigMap": ("core", "config_map"),
    "Service": ("core", "service"),
    "PodDisruptionBudget": ("policy", "pod_disruption_budget"),
    "Job": ("batch", "job"),
    "CronJob": ("batch", "cron_job"),
    "Deployment": ("apps", "deployment"),
}
CUSTOM = {
    "JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobsets"),
    "TrainingRuntime": ("trainer.kubeflow.org", "v1alpha1", "trainingruntimes"),
    "TrainJob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
}
# The client does not check what a kubeconfig looks like before it walks through it.
BAD_KUBECONFIG = (config.ConfigException, yaml.YAMLError, OSError, TypeError, LookupError, AttributeError)
T = TypeVar("T")


class Connection(NamedTuple):
    """A client of one cluster, and the namespace of a workload there."""

    api: client.ApiClient
    namespace: str
    host: str

    @property
    def core(self) -> client.CoreV1Api:
        """Pods and their logs."""
        return client.CoreV1Api(self.api)

    def create(self, kind: str, body: Any) -> None:
        """Sends an object, once more only where the server was too busy to take it."""
        self._send((BUSY,), "create", kind, body)

    def replace(self, kind: str, name: str, body: Any) -> None:
        """Puts an object in the place of the one of this name."""
        self._send((BUSY,), "replace", kind, name, body)

    def delete(self, kind: str, name: str) -> None:
        """Deletes an object, and in the background what it owns."""
        self._send((BUSY, *UNAVAILABLE), "delete", kind, name, propagation_policy="Background")

    def read(self, kind: str, name: str) -> Any:
        """An object: the client's type, or a mapping for a kind without one."""
        return self._send((BUSY, *UNAVAILABLE), "get" if kind in CUSTOM else "read", kind, name)

    def find(self, kind: str, name: str) -> Any:
        """An object, or None where there is none."""
        try:
            return self.read(kind, name)
        except client.ApiException as error:
            if error.status != 404:
                raise
            return None

    def pods(self, label_selector: str) -> client.V1PodList:
        """The pods with these labels."""
        list_pods = partial(self.core.list_namespaced_pod, self.namespace, label_selector=label_selector)
        return retried(partial(list_pods, _request_timeout=TIMEOUT_S), (BUSY, *UNAVAILABLE))

    def _send(self, again: tuple[int, ...], verb: str, kind: str, *arguments: Any, **options: Any) -> Any:
        if kind in CUSTOM:
            group, version, plural = CUSTOM[kind]
            api, name = client.CustomObjectsApi(self.api), "custom_object"
            words = (group, version, self.namespace, plural, *arguments)
        else:
            group, name = METHODS[kind]
            api = getattr(client, f"{group.capitalize()}V1Api")(self.api)
            own = 0 if verb == "create" else 1  # the object's name comes first
            words = (*arguments[:own], self.namespace, *arguments[own:])
        method = getattr(api, f"{verb}_namespaced_{name}")
        return retried(partial(method, *words, _request_timeout=TIMEOUT_S, **options), again)


def retried(send: Callable[[], T], codes: tuple[int, ...]) -> T:
    """What a request returns, which is repeated after these codes and, if one of them is a server's fault, a lost connection.

    Waits as long as the server asks for, or else twice as long each time.
    """
    for attempt in range(TRIES):
        try:
            return send()
        except ProtocolError:
            if attempt == TRIES - 1 or not set(UNAVAILABLE) <= set(codes):
                raise
            time.sleep(min(2.0**attempt, LONGEST_WAIT_S))
        except client.ApiException as error:
            if attempt == TRIES - 1 or error.status not in codes:
                raise
            asked = str((error.headers or {}).get("Retry-After", ""))
            time.sleep(min(float(asked) if asked.isdecimal() else 2.0**attempt, LONGEST_WAIT_S))
    raise AssertionError("unreachable")


def current_context() -> str | None:
    """The name of the kubeconfig's; None where there is no usable kubeconfig, as inside a cluster."""
    try:
        return str(config.list_kube_config_contexts()[1]["name"])
    except BAD_KUBECONFIG:
        return None


def connect(cluster: KubernetesSettings, namespace: str | None = None) -> Connection:
    """A client for the cluster's context, by default the current one, or for the cluster this runs in.

    Args:
        namespace: of a submitted workload; None: the cluster's, or else that of the context.
    Raises:
        UserError: there is no usable kubeconfig.
    """
    settings = client.Configuration()
    try:
        config.load_kube_config(context=cluster.context, client_configuration=settings)
        contexts, current = config.list_kube_config_contexts()
        named = {one["name"]: one for one in contexts} | {None: current}
        own = named[cluster.context]["context"].get("namespace", "default")
    except BAD_KUBECONFIG as outside:
        try:
            if cluster.context:
                raise config.ConfigException
            config.load_incluster_config(client_configuration=settings)
            own = NAMESPACE_FILE.read_text().strip()
        except (config.ConfigException, OSError):
            raise UserError(
                f"no usable kubeconfig ({one_line(outside)}): set KUBECONFIG to a file with a context "
                "(kubectl config get-contexts lists them), or print the manifests with dry_run=true"
            ) from None
    settings.retries = False  # urllib3 would log each retry: a cluster that does not answer is one line
    return Connection(client.ApiClient(settings), namespace or cluster.namespace or own, settings.host)


@contextmanager
def refusals(to: Connection, kind: str, name: str) -> Iterator[None]:
    """Turns a request that fails into a UserError of one line."""
    try:
        yield
    except HTTPError as error:
        raise UserError(
            f"{kind} {name}: the cluster at {to.host} does not answer ({one_line(error)}). Check the context and the network."
        ) from None
    except client.ApiException as error:
        raise UserError(_refusal(to, kind, name, error)) from None


def _refusal(to: Connection, kind: str, name: str, error: client.ApiException) -> str:
    try:
        reason = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        reason = f"{error.status} {error.reason}"
    line = f"{kind} {name} in namespace {to.namespace}: the cluster refuses: {one_line(Exception(reason))}"
    match error.status:
        case 401:
            return f"{line}. Log in again: the credentials of the kubeconfig are not accepted."
        case 403:
            return f"{line}. k8s/PODS.md lists what who submits must be allowed to do."
        case 409:
            return f"{line}. Choose another name=, or delete it: kubectl delete -n {to.namespace} {kind.lower()} {name}"
        case 429:
            return f"{line}. The cluster is busy: try again later."
        case status if status in UNAVAILABLE:
            return f"{line}. Try again later."
    return line
