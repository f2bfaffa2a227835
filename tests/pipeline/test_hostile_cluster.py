"""Values of a submission that try to be more than one value: of another field, of YAML, of Kubernetes' own variables."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from k8s_manifests import DIGEST, cluster, documents, kustomized, manifests, pod_of, workload
from pydantic import ValidationError

from features.errors import UserError
from pipeline.cluster.base import Resources
from pipeline.cluster.kubernetes.pod import escaped
from pipeline.cluster.values import is_pinned


def expanded(text: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a container's argument, from its documentation, with a reader of one character at a time.

    $(NAME) is the variable's value, or stays as it is where there is none; $$ is $; any other $ stays.
    """
    seen, rest = "", text
    while rest:
        if rest.startswith("$$"):
            seen, rest = seen + "$", rest[2:]
        elif rest.startswith("$(") and ")" in rest:
            name, _, after = rest[2:].partition(")")
            seen, rest = seen + environment.get(name, f"$({name})"), after
        else:
            seen, rest = seen + rest[0], rest[1:]
    return seen


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("$(X)", "value"),
        ("a $(X)-$(X)", "a value-value"),
        ("$(Y)", "$(Y)"),
        ("$$(X)", "$(X)"),
        ("$$$(X)", "$value"),
        ("$$$$(X)", "$$(X)"),
        ("$X $ $(X", "$X $ $(X"),
        ("$", "$"),
        ("$$", "$"),
    ],
)
def test_the_model_of_expansion_follows_the_documented_rules(text: str, result: str) -> None:
    assert expanded(text, {"X": "value"}) == result


@given(
    st.lists(st.sampled_from(["$", "$$", "(", ")", "$(", "X", "HOME", "=", "{", "\n"]) | st.text(), max_size=12),
    st.dictionaries(st.sampled_from(["X", "HOME", "", "$", "(X"]) | st.text(max_size=3), st.text(max_size=3)),
)
def test_a_container_receives_any_text_as_it_was_given(parts: list[str], environment: dict[str, str]) -> None:
    text = "".join(parts)
    assert expanded(escaped(text), environment) == text


@pytest.mark.parametrize("arg", ["a=$$(HOME)", "a=$(HOME)", "a=$$$(JOB_NAME)", "a=$", "a=$$", "a=\\${now:%Y}"])
def test_an_argument_reads_no_variable_of_the_pod(arg: str) -> None:
    (container,) = pod_of(documents(job="train", words=[arg])["Job"])["containers"]
    environment = {"HOME": "/tmp", "JOB_NAME": "secret"}
    assert [expanded(text, environment) for text in container["args"]] == [arg]


LONG = "a" * 300
# field: values that are one value, and values that would be more, or none that Kubernetes takes
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "image": (
        ["taskfuse:0.1.0", "taskfuse", f"taskfuse@{DIGEST}", "localhost/a", "localhost:5000/a/b-c__d.e:V1.x_y",
         f"registry.example:443/team/taskfuse:0.1.0@{DIGEST}", "10.0.0.1:5000/a"],
        ["", "a b", "a\n", "a:1\nhostNetwork: true", "a: b", "a # b", "a@sha256:0123", f"a@{DIGEST.upper()}", f"a@{DIGEST}0",
         f"a@{DIGEST}\n", "a@md5:" + "0" * 32, "UPPER", "-a", "a/", "/a", "a//b", "a:-x", "a..b", "../a", "a:" + "b" * 129,
         "${oc.env:HOME}", "a@b:c@d", "https://a/b", "$(X)", "é", "a\u2028b", "a" * 600],
    ),
    "name": (["a", "run-7", "a" * 52], ["", "A", "7", "-a", "a-", "a.b", "a\n", "a" * 53, "a: b", "a,b", "a=b", "á"]),
    "namespace": (["ml", "1-a", "a" * 63, None], ["", "a.b", "a" * 64, "a\n", "ML", "-a", "../x", "a/b", "a?x=1"]),
    "data_claim": (["logs", "a.b-c", "1e3"], ["", "a..b", "a.", ".a", "a\n", "a\nname: x", "A", "a/b", LONG]),
    "runs_claim": (["runs"], ["a_b", "a b", "a\n", "{}"]),
    "cpu": (["4", "500m", "0.5"], ["0", "0.0", "-1", "4\n", "1e3", "4Gi", "٣", " 4", "4 ", "nan", ".5", "04", True]),
    "memory": (["16Gi", "1.5G", "100000000", "8k"], ["16GB", "0Gi", "16 Gi", "16Gi\n", "1m", "1Gi, x: y", "٣Gi", "9" * 16, ""]),
    "storage": (["100Gi"], ["100Gi\n", "0", "all"]),
    "shared_memory": (["2Gi", None], ["2Gi\n", "50%", "m"]),
    "ephemeral_storage": (["4Gi"], ["4Gi\n", "-4Gi", "0Ti"]),
    "egress": (
        [[], ["10.0.0.0/8"], ["0.0.0.0/0", "::/0"], ["192.0.2.7/32"]],
        [["10.0.0.1/8"], ["10.0.0.0"], ["10.0.0.0/33"], ["10.0.0.0/8\n"], ["example.org"], ["fe80::%eth0/64"], [""],
         ["10.0.0.0/255.0.0.0"], ["10.0.0.0/8, x: y"], "10.0.0.0/8"],
    ),
    "schedule": (
        ["0 3 * * *", "*/5 0-6/2,12 1,15 JAN-mar,12 mon-FRI", "59 23 31 12 6", "0/15 * * * *", "0  3 * *  0"],
        ["daily", "@daily", "60 3 * * *", "0 24 * * *", "0 3 0 * *", "0 3 32 * *", "0 3 * 0 *", "0 3 * 13 *", "0 3 * * 7",
         "5-1 * * * *", "*/0 * * * *", "*/x * * * *", "0 3 * * *\n", "0\n3 * * *", "0 3 * * * *", "0 3 * *", "0 3 * * MON-",
         "0 3 * * ,", "* * JAN * *", "TZ=UTC 0 3 * * *", "٠ 3 * * *", "0\t3 * * *", "-1 * * * *", "1.5 * * * *", "",
         "1,1" * 100 + " 3 * * *"],
    ),
    "secrets": (
        [{}, {"AWS_ACCESS_KEY_ID": "logs/id"}, {"_a": "a.b/.c-D_e"}],
        [{"A": "b"}, {"A": "b/c/d"}, {"A": "b/"}, {"A": "/c"}, {"A": "b/c\n"}, {"A": "b/.."}, {"A": "b/."}, {"A": "B/c"},
         {"A-B": "b/c"}, {"A\n": "b/c"}, {"A=1": "b/c"}, {"": "b/c"}, {"1A": "b/c"}, {"HOME": "b/c"}, {"JOB_NAME": "b/c"},
         {"A": "b/c d"}, {"A": f"{LONG}/c"}, {"A": "$(X)/c"}, {"A": None}],
    ),
    "words": (
        [["a=b"], ["a= $x ${now:%Y}"], ["~a"], ["+a.b=c"], ["a=x\ny: z"], ["a={b: c}"], ["a=é 日本 😀"]],
        [["a"], ["=b"], ["a=\0"], ["a=\x1b[31m"], ["a=\ud800"], ["a=${oc.env:HOME}"], ["a=\\${oc.env:HOME}"],
         ["a=${ oc.decode:x}"], ["a=${${b}.env:HOME}"], ["a=${oc.${b}:HOME}"], ["a=\u202eb"]],
    ),
    "time_limit_s": ([1, 3600], [0, -1, "1h", 1.5, None]),
    "ttl_s": ([0, 60, None], [-1, "1d"]),
    "environment": (
        [{}, {"NCCL_DEBUG": "INFO"}, {"A": "$(HOME) $$x\ny: z"}, {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1"}],
        [{"A-B": "b"}, {"A\n": "b"}, {"": "b"}, {"HOME": "b"}, {"OMP_NUM_THREADS": "1"}, {"A": None},
         {"NCCL_IB_HCA": "a, b"}, {"NCCL_IB_HCA": ""}, {"NCCL_DEBUG": "INFO\n"}, {"Nccl_Debug": "INFO"}, {"RANK": "0"}],
    ),
    "queue": (["gpu", "a.b", None], ["", "A", "a\n", "a b", "a/b", LONG]),
    "priority_class": (["high"], ["", "A", "a\nb: c"]),
    "runtime_class": (["nvidia"], ["", "A", "a: b"]),
    "topology": (
        ["example.com/rack", "zone", "topology.kubernetes.io/zone"],
        ["", "a/", "/a", "a/b/c", "a\n", "a b", "-a", f"{LONG}/a"],
    ),
    "spread": (["kubernetes.io/hostname"], ["a:b", "A/b", "a" * 64]),
    "node_selector": (
        [{}, {"a.b/c": "D_e.f"}, {"a": ""}],
        [{"a b": "c"}, {"a": "b c"}, {"a": "b\n"}, {"a": "a" * 64}, {"": "a"}],
    ),
    "tolerations": (
        [[], [{"key": "a/b"}], [{"operator": "Exists"}],
         [{"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute"}]],
        [[{"key": "a b"}], [{"key": "a", "value": "b"}], [{"operator": "Equal", "value": "b"}], [{"effect": "Never"}],
         [{"key": "a", "operator": "Equal"}], [{"key": "a", "hostPath": "/"}]],
    ),
    "devices": ([{}, {"vpc.amazonaws.com/efa": 4}], [{"efa": 4}, {"a.b/c": 0}, {"a.b/c": "4x"}, {"a.b/c\n": 1}, {"/c": 1}]),
    "form": (["job", "jobset", "trainjob"], ["Job", "", "pod"]),
}  # fmt: skip


def made(**values: Any) -> None:
    cluster(**values)
    workload(**values)


@pytest.mark.parametrize(("given", "text"), [(2, "2"), (1.5, "1.5"), ("500m", "500m")])
def test_a_number_of_cpus_may_be_a_number(given: Any, text: str) -> None:
    assert Resources(cpu=given).cpu == text


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, (good, _) in VALUES.items() for value in good])
def test_one_value_is_accepted(field: str, value: Any) -> None:
    policy, account, cron_job = yaml.safe_load_all(manifests(job="nightly", **{field: value}))
    assert (policy["kind"], account["kind"], cron_job["kind"]) == ("NetworkPolicy", "ServiceAccount", "CronJob")
    (container,) = pod_of(cron_job)["containers"]
    if field == "words":
        assert [expanded(arg, {}) for arg in container["args"]] == value
    elif field == "image":
        assert container["image"] == value
    elif field == "environment":
        variables = {entry["name"]: expanded(entry.get("value", ""), {"HOME": "/tmp"}) for entry in container["env"]}
        assert variables.items() >= value.items()
    elif field == "schedule":
        assert cron_job["spec"]["schedule"] == " ".join(value.split())


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, (_, bad) in VALUES.items() for value in bad])
def test_what_is_no_single_value_of_its_field_is_refused(field: str, value: Any) -> None:
    with pytest.raises(
        ValidationError, match=rf"1 validation error for (?:Workload|Kubernetes)\n(?:{field}|  Value error, {field})"
    ):
        made(job="nightly", **{field: value})


def leaves(content: Any, at: str = "") -> dict[str, Any]:
    """Paths of a document to the values there."""
    if isinstance(content, dict):
        return {k: v for key, value in content.items() for k, v in leaves(value, f"{at}/{key}").items()} or {at: {}}
    if isinstance(content, list):
        return {k: v for n, value in enumerate(content) for k, v in leaves(value, f"{at}/{n}").items()} or {at: []}
    return {at: content}


TEXTS = st.sampled_from(["image", "name", "namespace", "data_claim", "cpu", "memory", "schedule"])
JUNK = st.lists(
    st.sampled_from(["\n", ": ", " #", "'", '"', "{", "}", "- ", "!!", "&a", "*", "\t", "$(", "1e3", "~", "\x00", "y", "0x1"])
    | st.text(max_size=2),
    max_size=5,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(field=TEXTS, start=st.sampled_from(["", "a", "1", "4", "0 3 * * "]), junk=JUNK)
def test_no_value_changes_another_field(field: str, start: str, junk: list[str]) -> None:
    value = start + "".join(junk)
    usual: dict[str, Any] = {"job": "nightly", "words": ["a=b"], "namespace": "ml", "name": "known"}
    try:
        made(**usual | {field: value})
    except ValidationError:
        return
    texts = (manifests(**usual | {field: value}), manifests(**usual))
    found, known = ([leaves(d) for d in yaml.safe_load_all(text)] for text in texts)
    allowed = {value, " ".join(value.split())}
    for ours, before in zip(found, known, strict=True):
        assert ours.keys() == before.keys()
        changed = {ours[path] for path in ours if ours[path] != before[path]} - allowed
        assert all(field == "cpu" and text.isdigit() for text in changed), "threads follow from cpu"


@settings(max_examples=40, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(["1e3", "y", "\n- b", ": c", "'", '"', "!!"])
)
def test_an_argument_is_one_argument_whatever_it_holds(text: str) -> None:
    try:
        found = documents(job="train", words=[f"a={text}", "b=c"])
    except ValidationError:
        return  # a text that turns the direction of others, or looks something up
    (container,) = pod_of(found["Job"])["containers"]
    assert [expanded(arg, {}) for arg in container["args"]] == [f"a={text}", "b=c"]


NASTY = [
    "=1e3",
    "=y",
    "=a: b",
    "=- a",
    "=#",
    "= a\n  b\n\nc: d\n",
    "='\"",
    "={a: 1}",
    "=\t",
    "=%",
    "=é 日本 😀",
    "=\\n",
    "=a  b " * 40,
]


def test_kubectl_reads_the_values_that_were_written(tmp_path: Path) -> None:
    given_values = {
        "words": [f"key{text}" for text in NASTY],
        "name": "y",
        "namespace": "1e3",
        "data_claim": "0x1f",
        "schedule": "1 1 1 1 1",
        "cpu": "1",
    }
    text = manifests(job="nightly", **given_values)
    (tmp_path / "all.yaml").write_text(text)
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    read, written = kustomized(tmp_path), list(yaml.safe_load_all(text))
    assert sorted(read, key=lambda d: d["kind"]) == sorted(written, key=lambda d: d["kind"])
    assert written[-1]["metadata"] == {"name": "y", "namespace": "1e3", "labels": written[-1]["metadata"]["labels"]}


@pytest.mark.parametrize("image", ["taskfuse:0.1.0", "taskfuse", "registry.example/taskfuse:latest"])
def test_a_tag_is_submitted_only_where_it_is_allowed(image: str) -> None:
    assert not is_pinned(image)
    with pytest.raises(UserError, match=re.escape(f"image={image} is a tag")):
        cluster(image=image).render(workload())
    with pytest.raises(UserError, match="allow_tag=true"):
        cluster(image=image).submit(workload())
    assert f"image: {image}\n" in cluster(image=image, allow_tag=True).render(workload())
    assert f"image: {image}@{DIGEST}\n" in cluster(image=f"{image}@{DIGEST}").render(workload())
