"""READMEs: links and paths resolve, commands and schemas parse, make targets exist, every folder has one."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from features.schema.schema import Schema
from jobs.submit import VERBS, split

ROOT = Path(__file__).parents[1]
PACKAGES = ("features", "models", "pipeline", "jobs")
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(page for top in (*PACKAGES, "k8s", "tests") for page in (ROOT / top).rglob("*.md")),
    ]
    if "runs" not in path.parts
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
CODE = re.compile(r"^```.*?^```", re.S | re.M)
FOLDERS = [
    *(Path(name) for name in ("features", "models", "pipeline", "jobs", "k8s", "tests", "tests/benchmarks")),
    *sorted(p.parent.relative_to(ROOT) for p in (ROOT / "models").glob("*/__init__.py")),
    *sorted(p.parent.relative_to(ROOT) for p in (ROOT / "pipeline").glob("*/__init__.py")),
    *sorted(p.parent.relative_to(ROOT) for p in (ROOT / "pipeline" / "training").glob("*/__init__.py")),
]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_resolve_to_a_file_and_a_heading(page: Path) -> None:
    text = CODE.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_in_code_spans_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", CODE.sub("", page.read_text()))
    paths = [span for span in spans if re.fullmatch(rf"({'|'.join(PACKAGES)}|k8s|tests)/[a-z0-9_./*-]+", span)]
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_every_folder_has_a_readme_of_one_screen(folder: Path) -> None:
    assert 15 <= len((ROOT / folder / "README.md").read_text().splitlines()) <= 40


def test_the_main_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def code_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, continued lines joined, without prompt and comment."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(CODE.findall(text))
    indented = "\n".join(line.strip() for line in CODE.sub("", text).splitlines() if line.startswith("    "))
    for line in f"{fenced}\n{indented}".splitlines():
        yield re.split(r"\s+# ", line.removeprefix("$ "))[0].strip()


def hydra_commands() -> Iterator[tuple[str, str, list[str]]]:
    """Page, job and words of every command line of a job that Hydra reads. `…` stands for words that are left out."""
    for page, name in zip(PAGES, IDS, strict=True):
        for line in code_lines(page):
            found = re.match(r"(?:python|torchrun .*|… *)-m jobs\.(\w+)(.*)|python -m jobs\.(\w+)(.*)", line)
            if not found:
                continue
            job, rest = (found[1], found[2]) if found[1] else (found[3], found[4])
            if launched := re.search(r"-m jobs\.train(.*)", rest):  # by jobs.launch
                job, rest = "train", launched[1]
            words = [word for word in shlex.split(rest.partition(" | ")[0]) if "…" not in word]
            if (ROOT / "jobs" / "conf" / f"{job}.yaml").exists():
                yield name, job, words
            else:
                assert (ROOT / "jobs" / f"{job}.py").exists(), line


COMMANDS = list(hydra_commands())


@pytest.fixture(scope="module")
def my_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my/conf of the READMEs: the schema of the reference, as data=mine and data=large."""
    folder = tmp_path_factory.mktemp("my") / "conf"
    (folder / "data").mkdir(parents=True)
    for name in ("mine", "large"):
        (folder / "data" / f"{name}.yaml").write_text(schemas(ROOT / "features" / "SCHEMA.md")[0])
    return folder


@pytest.mark.parametrize(("page", "job", "words"), COMMANDS, ids=[f"{page}:{job}" for page, job, _ in COMMANDS])
def test_commands_are_configurations(page: str, job: str, words: list[str], my_conf: Path) -> None:
    if words == ["--help"]:
        return
    own = "--config-dir=my/conf" in words or any(word.startswith("+data.schema") for word in words)
    if job == "submit":
        parts = split(words)
        if parts.verb not in VERBS:
            test_commands_are_configurations(page, parts.verb, parts.job, my_conf)
        words = parts.own
    overrides = [word for word in words if not word.startswith("--")]
    if any(word.startswith("+data.schema") for word in words):
        overrides.insert(0, "data=mine")
    if own:
        overrides.append(f"hydra.searchpath=[file://{my_conf}]")
    with initialize_config_dir(str(ROOT / "jobs" / "conf"), version_base=None):
        compose(job, overrides)  # raises for an unknown key, group or value


def test_an_unknown_key_would_not_compose(my_conf: Path) -> None:
    with pytest.raises(ConfigCompositionException, match="batchsize"):
        test_commands_are_configurations("", "train", ["train.batchsize=8"], my_conf)


def schemas(page: Path) -> list[str]:
    """YAML blocks of a page that hold a schema."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.S | re.M)
    return [block for block in blocks if "schema:" in block]


@pytest.mark.parametrize("page", ["README.md", "features/SCHEMA.md"])
def test_schemas_are_valid(page: str) -> None:
    found = schemas(ROOT / page)
    assert found
    for text in found:
        Schema.parse(yaml.safe_load(text)["schema"], where=page)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^ {4}make ([a-z-]+)", text, re.M)
        assert set(named) - targets <= {"bench-"}, page  # `make bench-*` is all of them
