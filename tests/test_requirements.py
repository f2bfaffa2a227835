"""Pinned sets: every file that is installed has its hash, a set is complete and holds nothing else, and torch's parts fit."""

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.versions import AHEAD, check_versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
FILES = sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("requirements*.txt"), *ROOT.rglob("tests/benchmarks/req*.txt")]
)
CPU, GPU, CUDA, TEST, BUILD, TORCH_CPU = (
    f"requirements-{name}.txt" for name in ("cpu", "gpu", "cuda", "test", "build", "torch-cpu")
)
BENCH = "tests/benchmarks/requirements.txt"
LINE = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.*?))?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
# torchrec asks for the CUDA build of fbgemm; on a CPU fbgemm-gpu-cpu stands in for it.
STANDS_IN = {"fbgemm-gpu": "fbgemm-gpu-cpu"}


class Pin(NamedTuple):
    version: str
    here: bool  # whether this platform and Python install it
    hashes: frozenset[str]


def pins(name: str) -> dict[str, Pin]:
    """A requirements file by package. Fails on anything but pins with hashes: no option, index or URL."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.M)
    assert re.sub(LINE, "", text) == ""
    found = LINE.findall(text)
    assert len({package for package, *_ in found}) == len(found)
    return {
        package: Pin(
            version,
            not marker or bool(Requirement(f"x; {marker}").marker.evaluate()),  # type: ignore[union-attr]
            frozenset(re.findall(r"[0-9a-f]{64}", hashes)),
        )
        for package, version, marker, hashes in found
    }


def needed(requirements: Iterable[str]) -> set[str]:
    """Packages that requirements need here, with all that those need, from what is installed. Versions must fit as well.

    Where torch is the CUDA build, the libraries it needs are left out: they are requirements-cuda.txt.
    """
    waiting, seen = [Requirement(text) for text in requirements], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        name = STANDS_IN.get(name, name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        installed = metadata.distribution(name)
        assert requirement.specifier.contains(installed.version, prereleases=True), (
            f"{requirement}: {installed.version}"
        )
        for text in installed.requires or []:
            child = Requirement(text)
            if not child.marker or any(child.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")):
                waiting.append(child)
    return {name for name, _ in seen} - (set(pins(CUDA)) - {"torch"})


def test_all_files_are_known_here() -> None:
    assert sorted([CPU, GPU, CUDA, TEST, BUILD, TORCH_CPU, BENCH]) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_is_one_version_with_hashes(name: str) -> None:
    assert all(pin.hashes for pin in pins(name).values())
    assert pins(name)


def test_one_version_of_a_package_in_all_files() -> None:
    versions: dict[str, set[str]] = {}
    for name in FILES:
        for package, pin in pins(name).items():
            versions.setdefault(package, set()).add(pin.version.partition("+")[0])
    assert {package: found for package, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            CPU,
            [
                *(d for d in DEPENDENCIES if not d.startswith("fbgemm-gpu>")),
                *EXTRAS["cpu"],
                *EXTRAS["s3"],
                *EXTRAS["serve"],
            ],
        ),
        (GPU, [*DEPENDENCIES, *EXTRAS["s3"], *EXTRAS["serve"]]),
        (BENCH, EXTRAS["bench"]),
        (BUILD, [*PROJECT["build-system"]["requires"], "pip"]),
    ],
)
def test_pins_are_within_the_bounds_of_pyproject(name: str, wanted: list[str]) -> None:
    found = pins(name)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)].version), requirement


def test_the_run_set_is_what_a_run_needs_and_no_more() -> None:
    wanted = needed([*DEPENDENCIES, *EXTRAS["cpu"], *EXTRAS["s3"], *EXTRAS["serve"]])
    assert {name for name, pin in pins(CPU).items() if pin.here} == wanted
    assert wanted.isdisjoint({"pytest", "moto", "flask", "mypy", "duckdb", "ruff", "hypothesis"})


def test_the_test_set_is_what_tests_need_beyond_it() -> None:
    wanted = needed(EXTRAS["test"])
    assert {name for name, pin in pins(TEST).items() if pin.here} == wanted - set(pins(CPU))


def test_the_gpu_set_is_the_run_set_with_cuda_builds() -> None:
    run, gpu, cuda = pins(CPU), pins(GPU), pins(CUDA)
    assert set(gpu) == (set(run) - {"fbgemm-gpu-cpu"}) | {"fbgemm-gpu"} | set(cuda)
    assert {name: gpu[name] for name in cuda} == cuda
    assert {name for name in cuda if not re.match("cuda-|nvidia-", name)} == {"torch", "triton"}
    for name in (set(gpu) & set(run)) - {"torch"}:
        assert gpu[name] == run[name]


def test_a_cpu_and_a_cuda_build_of_torch_are_not_taken_for_each_other() -> None:
    build = pins(TORCH_CPU)["torch"]
    assert pins(TORCH_CPU).keys() == {"torch"}
    assert build.version == pins(CPU)["torch"].version + "+cpu"
    assert build.hashes == pins(CPU)["torch"].hashes
    assert build.hashes.isdisjoint(pins(GPU)["torch"].hashes)


@pytest.mark.parametrize("name", [CPU, GPU])
def test_torch_torchrec_and_fbgemm_of_a_set_belong_together(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = pins(name)

    def version(package: str) -> str:
        if package not in found:
            raise metadata.PackageNotFoundError(package)
        return found[package].version

    monkeypatch.setattr("jobs.versions.metadata.version", version)
    assert version("torch")
    check_versions()


def test_the_newest_and_the_oldest_releases_that_pip_may_pick_belong_together() -> None:
    bounds = {r.name: r.specifier for r in map(Requirement, [*DEPENDENCIES, *EXTRAS["cpu"]])}

    def minors(name: str, major: int) -> list[int]:
        return [
            minor for minor in range(40) if any(bounds[name].contains(f"{major}.{minor}.{patch}") for patch in range(5))
        ]

    torch = minors("torch", 2)
    assert torch == list(range(torch[0], torch[-1] + 1)), "no gap"
    for name in ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"):
        assert [minor + AHEAD for minor in minors(name, 1)] == torch, name
        assert minors(name, 0) == minors(name, 2) == []


def test_what_is_installed_is_what_is_pinned() -> None:
    wanted = {name: pin.version for name, pin in {**pins(CPU), **pins(TEST)}.items() if pin.here}
    assert {name: metadata.version(name).partition("+")[0] for name in wanted} == wanted


def installs(text: str) -> list[str]:
    """The pip commands of a Makefile or Dockerfile, with lines and variables put together."""
    text = re.sub(r" *\\\n\s*", " ", text)
    for name, value in re.findall(r"^(\w+) := (.*)$", text, re.M)[::-1]:
        text = text.replace(f"$({name})", value)
    return re.findall(
        r"pip [^|&;\n]*\binstall\b[^|&;\n]*|pip install[^|&;\n]*", re.sub(r"^\s*#.*$|^\w+ :=.*$", "", text, flags=re.M)
    )


@pytest.mark.parametrize("name", ["k8s/Dockerfile", "Makefile"])
def test_nothing_is_installed_without_a_hash_or_built_with_tools_that_have_none(name: str) -> None:
    commands = installs((ROOT / name).read_text())
    assert len(commands) >= 5
    for command in commands:
        assert "--no-deps" in command
        if "-r " in command:
            assert "--require-hashes" in command
        else:
            assert re.search(r" (--editable )?\.\s*$", command), command
        assert "--no-build-isolation" in command or re.search(r"-r requirements-(build|torch-cpu|cuda).txt", command), (
            command
        )


def test_the_image_has_the_run_set_alone_on_a_base_of_one_digest() -> None:
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=python:3\.1[123][0-9.]*-slim@sha256:[0-9a-f]{64}$", text, re.M)
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["${BASE}", "${BASE}"]
    copied = set(re.findall(r"requirements-[a-z-]+\.txt", " ".join(re.findall(r"^COPY (.*)$", text, re.M))))
    assert copied == {BUILD, TORCH_CPU, CUDA, CPU, GPU}
    assert set(re.findall(r"-r \"?(requirements-[a-z$A-Z-]+\.txt)", text)) == {
        BUILD,
        TORCH_CPU,
        CUDA,
        "requirements-$VARIANT.txt",
    }


def test_no_file_names_a_package_index() -> None:
    for name in [*FILES, "Makefile", "k8s/Dockerfile"]:
        assert not re.search("(https?|file)://", (ROOT / name).read_text()), (
            f"{name}: which index to use is said by whoever installs"
        )
