"""Kubernetes: the cluster that a person's kubeconfig, or the pod this runs in, points at."""

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from kubernetes import client
from urllib3.exceptions import HTTPError

from features.errors import UserError
from pipeline.cluster.base import ENDED, Status, UnansweredError, Workload, of_rank
from pipeline.cluster.kubernetes.api import UNAVAILABLE, Connection, connect, current_context, refusals
from pipeline.cluster.kubernetes.logs import followed, so_far
from pipeline.cluster.kubernetes.manifests import check, elements, kinds, main_kind, objects, to_yaml
from pipeline.cluster.kubernetes.pod import INSTANCE, labels
from pipeline.cluster.kubernetes.settings import KubernetesSettings
from pipeline.cluster.kubernetes.status import of_all, of_one
from pipeline.cluster.values import is_pinned

POLL_S = 2.0  # between two looks at whether pods have ended
POD_END_S = 60  # that the cluster may take to delete pods, beyond their grace period
STAY = ("NetworkPolicy", "ServiceAccount", "ConfigMap")  # what pods need to their end


class Kubernetes(KubernetesSettings):
    """train is an Indexed Job with a headless Service, or a JobSet or TrainJob; others are Jobs, CronJobs, Deployments."""

    def pinned(self) -> dict[str, Any]:
        """The context that is the current one now: later commands ask that cluster, whichever is current by then."""
        return {"context": self.context or current_context()}

    def render(self, work: Workload) -> str:
        """Manifests that `kubectl apply -f -` takes. Raises UserError where the image is not one for good."""
        self._check(work)
        return to_yaml([part for element in elements(work) for part in objects(self, element)])

    def submit(self, work: Workload) -> str:
        """Creates the objects of the workload, all of them or none; the Job last, so that it never runs without the others.

        What a Job that was deleted left behind, as it is `ttl_s` after its end, is replaced.
        """
        self._check(work)
        to, main, every = connect(self), main_kind(self, work), elements(work)
        parts = [(element, objects(self, element)) for element in every]  # before anything is created
        for element in every:
            with refusals(to, main, element.name):
                if to.find(main, element.name) is not None:
                    raise UserError(self._taken(to, work, main, element.name))
        made: list[tuple[str, str]] = []
        for element, own in parts:
            for kind, part in zip(kinds(self, element), own, strict=True):
                try:
                    with refusals(to, kind, element.name):
                        if _create(to, element.name, kind, part, replace=kind != main):
                            made.append((kind, element.name))
                except BaseException as error:  # Ctrl-C too
                    doubtful = None if kind == main or _is_refusal(error) else kind
                    _roll_back(to, made, main, element, doubtful)
                    if isinstance(error, UserError):
                        raise _if_unanswered(to, error, main, element.name, f"{to.namespace}/{work.name}") from None
                    raise
        return f"{to.namespace}/{work.name}"

    def status(self, work: Workload, native: str) -> Status:
        """State of the Job, JobSet, TrainJob or Deployment, or for a schedule of its CronJob: running while a Job of it is."""
        to, main = self._connect(native), main_kind(self, work)
        found = []
        for element in elements(work):
            with refusals(to, main, element.name):
                if (part := to.find(main, element.name)) is None:
                    when = f", or deleted {self.ttl_s} s after its end (ttl_s)" if self.ttl_s is not None else ""
                    raise UserError(f"{main} {element.name} is not in namespace {to.namespace}: stopped{when}")
                found.append(of_one(self, element, main, part, partial(_listed, to, element.name)))
        return of_all(found)

    def logs(self, work: Workload, native: str, rank: int | None, follow: bool) -> Iterator[str]:
        """Lines of every pod that has started, without control characters; of one pod after the other unless they are followed.

        Args:
            rank: only what this rank marks as its own, in the pod of its node; elastic nodes change their ranks, and all
                pods are read.
        """
        to, index = self._connect(native), _index(work, rank)
        names = [element.name for element in elements(work)]
        if follow:
            lines = followed(to, _pods_of(*names), index, lambda: self.status(work, native).state in ENDED)
        else:
            lines = chain.from_iterable(so_far(to, _pods_of(name), index) for name in names)
        yield from (line for line in lines if rank is None or of_rank(line, rank))

    def stop(self, work: Workload, native: str) -> None:
        """Deletes what there is of the workload, waits for its pods, which get SIGTERM, and deletes what they need last.

        Raises:
            UserError: there is nothing of it, or its pods outlast `grace_s` by a minute; their NetworkPolicy then stays.
        """
        to, main, every = self._connect(native), main_kind(self, work), elements(work)
        found = 0
        missing: client.ApiException | None = None
        for is_last in (False, True):
            if is_last:
                _wait_for_pods_to_go(to, work, [element.name for element in every])
            for element in every:
                for kind in reversed(kinds(self, element)):  # the Job before the Service that its pods meet through
                    if (kind in STAY) != is_last:
                        continue
                    with refusals(to, kind, element.name):
                        try:
                            to.delete(kind, element.name)
                            found += 1
                        except client.ApiException as error:
                            if error.status != 404:
                                raise
                            missing = missing or error
        if missing and not found:
            with refusals(to, main, every[0].name):
                raise missing

    def _connect(self, native: str) -> Connection:
        return connect(self, native.partition("/")[0])

    def _check(self, work: Workload) -> None:
        """Raises UserError for a workload that cannot be submitted, or whose image may be another one by its start."""
        check(self, work)
        if not (self.allow_tag or is_pinned(self.image)):
            raise UserError(
                f"image={self.image} is a tag, which a push can move to another image: give NAME@sha256:DIGEST, as "
                "docker push prints it (k8s/README.md), or set allow_tag=true"
            )

    def _taken(self, to: Connection, work: Workload, main: str, name: str) -> str:
        delete = f"kubectl delete -n {to.namespace} {','.join(kinds(self, work)).lower()} {name}"
        return f"{main} {name} in namespace {to.namespace} exists. Choose another name=, or delete it: {delete}"


def _pods_of(*names: str) -> str:
    return f"{INSTANCE}={names[0]}" if len(names) == 1 else f"{INSTANCE} in ({','.join(names)})"


def _listed(to: Connection, name: str) -> list[client.V1Pod]:
    return list(to.pods(_pods_of(name)).items)


def _index(work: Workload, rank: int | None) -> int | None:
    """The number of the pod that has a rank; None: all pods. Raises UserError for a rank that there is not."""
    if rank is None:
        return None
    ranks = work.nodes.most * work.ranks_per_node
    if not 0 <= rank < ranks:
        raise UserError(f"rank={rank}: {work.name} has ranks 0 to {ranks - 1}")
    return rank // work.ranks_per_node if work.kind.spread and not work.nodes.is_elastic else None


def _create(to: Connection, name: str, kind: str, part: Any, *, replace: bool) -> bool:
    """Creates an object; with `replace`, puts it in the place of one that an earlier workload of this name left.

    Returns:
        Whether it was created.
    """
    try:
        to.create(kind, part)
    except client.ApiException as error:
        if error.status != 409 or not replace:
            raise
        left, ours = _metadata(to.read(kind, name)), _metadata(part)
        if left.get("labels") != ours["labels"]:
            raise error from None
        if version := left.get("resourceVersion"):  # budgets and runtimes are not replaced without one
            part = client.ApiClient().sanitize_for_serialization(part)
            part["metadata"]["resourceVersion"] = version
        to.replace(kind, name, part)
        return False
    return True


def _metadata(part: Any) -> dict[str, Any]:
    plain = client.ApiClient().sanitize_for_serialization(part)
    return dict(plain.get("metadata") or {})


def _is_refusal(error: BaseException) -> bool:
    """Whether the server has said that it did nothing."""
    cause = error.__context__
    return isinstance(error, UserError) and isinstance(cause, client.ApiException) and cause.status not in UNAVAILABLE


def _roll_back(to: Connection, made: list[tuple[str, str]], main: str, work: Workload, doubtful: str | None) -> None:
    """Deletes what was created, unless the Job is there after all: its pods must not run without their NetworkPolicy.

    Args:
        made: kind and name of each object. doubtful: kind of one more of `work` that may have been created.
    """
    with suppress(client.ApiException, HTTPError):
        is_there = to.find(main, work.name) is not None
        found = to.find(doubtful, work.name) if doubtful and not is_there else None
        if (
            doubtful and found is not None and _metadata(found).get("labels") == labels(work)
        ):  # else it is someone else's
            to.delete(doubtful, work.name)
        for kind, own in reversed(made):
            if own != work.name or not is_there:
                to.delete(kind, own)


def _if_unanswered(to: Connection, error: UserError, main: str, name: str, native: str) -> UserError:
    """The error of a submission, and that the job is there all the same, if only the answer was lost."""
    refusal = error.__context__
    if isinstance(refusal, client.ApiException) and (refusal.status or 0) not in UNAVAILABLE:
        return error  # of someone else's, if it is there
    with suppress(client.ApiException, HTTPError):
        if to.find(main, name) is not None:
            return UnansweredError(
                f"{error} {main} {name} is there all the same: jobs.submit follows and stops it.", native
            )
    return error


def _wait_for_pods_to_go(to: Connection, work: Workload, names: list[str]) -> None:
    until = time.monotonic() + work.grace_s + POD_END_S
    while True:
        with refusals(to, "pods of", work.name):
            pods = to.pods(_pods_of(*names)).items
        if not pods:
            return
        if time.monotonic() > until:
            raise UserError(
                f"{len(pods)} pods of {work.name} in namespace {to.namespace} have not ended; their NetworkPolicy stays. "
                f"Once they have: kubectl delete -n {to.namespace} networkpolicy {' '.join(names)}"
            )
        time.sleep(POLL_S)
