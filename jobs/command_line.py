"""A command line and the files of its --config-dir, checked before Hydra reads them: what Hydra composes can run code.

A folder of configuration files may be untrusted. Its files fill the groups of jobs/conf and nothing else, Hydra's
own settings least of all: those name Python classes, log files and environment variables.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from features.errors import UserError
from features.printable import has_surrogates, printable
from features.yaml_text import MAX_BYTES, parse_yaml

CONF = Path(__file__).parent / "conf"
# The groups of CONF, each with the `# @package` line that its files may have.
GROUPS = {"data": None, "model": None, "interaction": "model.interaction", "recipe": "_global_", "cluster": None}
RECIPE_KEYS = ("model", "train", "tasks")  # a recipe stands at the top of the configuration
FLAGS = {
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc", "--info", "-i", "--config-dir", "-cd"),
}
OTHER_FILES = {"--config-path", "--config-name", "--experimental-rerun", "-cp", "-cn"}
MAX_DEPTH = 40  # of brackets, or of a dotted name
MAX_ENTRIES, MAX_FOLDERS = 10_000, 8  # of a --config-dir: files and folders in all, folders in each other
MAX_REFERENCES = 12  # ${…} of a configuration: each may double what the next one holds
NAME = r"[A-Za-z0-9_][\w.-]*"
# In a group's value: leads out of its folder, or to hidden files.
LEAVES_GROUP = re.compile(r"(^|[/\[\](),'\"\s=])[./]|[$\\]")
# Of another setting, or the time. Hydra's and OmegaConf's resolvers read the environment, or build what nobody wrote down.
ALLOWED_INTERPOLATION = re.compile(r"\$\{(?:[\w.\[\]-]+|now:[%\w :/.-]+)\}")


def check(words: Sequence[str]) -> None:
    """Checks what stands behind a job's name.

    Raises:
        UserError: an argument that is not UTF-8 or nested too deeply, a flag of Hydra that reads other files than --config-dir,
            an override that has them read, or a file under --config-dir that may not be there.
    """
    check_utf8(words)
    folders: list[str] = []
    dir_is_next = False
    for word in words:
        flag, equals, value = word.partition("=")
        if dir_is_next:
            folders, dir_is_next = [*folders, word], False
        elif flag in ("--config-dir", "-cd"):
            folders, dir_is_next = [*folders, value] if equals else folders, not equals
        elif word.startswith("-"):
            _check_flag(flag)
        else:
            _check_override(word)
    if dir_is_next:
        raise UserError("--config-dir is without its folder: --config-dir=DIR")
    if folders and "--resolve" in words:
        raise UserError(
            "--resolve does not go with --config-dir: --cfg job alone prints the configuration as it is written"
        )
    for folder in folders:
        check_folder(Path(folder))


def check_utf8(words: Sequence[str]) -> None:
    """Raises UserError for a word that is not UTF-8, which could neither be printed nor written down."""
    for word in words:
        if has_surrogates(word):
            raise UserError(f"the argument {printable(word)} is not UTF-8. Give the file or folder another name.")


def _check_flag(flag: str) -> None:
    if flag not in FLAGS:
        why = "reads a configuration from elsewhere" if flag in OTHER_FILES else "is no flag of a job"
        raise UserError(
            f"{printable(flag)} {why}. Settings are KEY=VALUE, files of your own come with --config-dir=DIR; see --help."
        )


def _check_override(word: str) -> None:
    key, _, value = (part.strip() for part in word.lstrip("+~ ").partition("="))
    shown = printable(word[:100])
    if key == "hydra.searchpath":
        raise UserError(f"{shown}: files of your own come with --config-dir=DIR, which are checked")
    if "@" in key:
        raise UserError(f"{shown}: a group cannot be put elsewhere with @. Write {key.split('@')[0]}=NAME.")
    if (key in GROUPS or key == "hydra" or key.startswith("hydra/")) and LEAVES_GROUP.search(value):
        raise UserError(f"{shown}: the value of a group is the name of one of its files, without .. and leading dots")
    if _depth(word) > MAX_DEPTH or key.count(".") > MAX_DEPTH:
        raise UserError(f"{shown}: nested more than {MAX_DEPTH} deep")


def _depth(word: str) -> int:
    deepest = depth = 0
    for character in word:
        depth += (character in "[{(") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def check_folder(folder: Path) -> None:
    """Checks every YAML file of a --config-dir; hidden files and folders are no part of it.

    Raises:
        UserError: naming the file and the key.
    """
    bases: dict[tuple[str, ...], tuple[str, ...]] = {}
    left = MAX_BYTES  # of all files together
    for path in _yaml_files(folder):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] not in GROUPS or len(parts) == 1:
            raise UserError(
                f"{path}: a file under --config-dir lies in one of the folders {', '.join(GROUPS)}. Move it there or away."
            )
        check_name(path, parts)
        content = _read(path, left)
        left -= len(content)
        if base := _check_file(path, content, parts[0]):
            bases[parts] = (*parts[:-1], base)
    for parts in bases:
        seen, now = {parts}, parts
        while now in bases:
            now = bases[now]
            if now in seen:
                raise UserError(
                    f"{folder / Path(*parts)}.yaml: defaults: {now[-1]} is made from itself. Break the circle."
                )
            seen.add(now)


def check_name(path: Path, parts: Sequence[str]) -> None:
    """Checks the name of a file that --config-dir is to read: Hydra reads CONF first, and one of the same name nowhere else.

    Args:
        parts: its group, folders below it and its name without .yaml.

    Raises:
        UserError: CONF has a file of this group and name, and it is another one.
    """
    own = CONF.joinpath(*parts[:-1], f"{parts[-1]}.yaml")
    if own.is_file() and not (path.exists() and path.samefile(own)):
        raise UserError(
            f"{path} has the name of a config of taskfuse, which would be read in its place: give it another name"
        )


def _yaml_files(folder: Path) -> Iterator[Path]:
    """Links are followed, as Hydra does: a mounted ConfigMap consists of them."""
    entries, left = 0, [(folder, 0)] if folder.is_dir() else []
    while left:
        here, depth = left.pop()
        for path in sorted(here.iterdir()):
            if path.name.startswith("."):
                continue
            entries += 1
            if entries > MAX_ENTRIES or depth > MAX_FOLDERS:
                raise UserError(
                    f"{folder}: more than {MAX_ENTRIES:,} files, or folders more than {MAX_FOLDERS} deep. --config-dir is a "
                    f"folder with {', '.join(GROUPS)} alone."
                )
            if path.is_dir():
                left.append((path, depth + 1))
            elif path.suffix.lower() in (".yaml", ".yml"):
                yield path


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is not a regular file. Move it away.")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path}: the files under --config-dir have more than {MAX_BYTES:,} bytes. Move others away.")
    return content


def _check_file(path: Path, content: bytes, group: str) -> str | None:
    """Checks one file. Returns the file of the same group that it starts from."""
    found = parse_yaml(content, str(path))
    keys = {} if found is None else found
    if not isinstance(keys, dict):
        raise UserError(f"{path}: holds no keys. Write KEY: VALUE lines.")
    _check_package(path, content.decode(), group)
    allowed = (*RECIPE_KEYS, "defaults")
    for key in keys:
        if key == "hydra" or (group == "recipe" and key not in allowed):
            these = (
                "a recipe has " + ", ".join(RECIPE_KEYS)
                if group == "recipe"
                else "it would change Hydra's own settings"
            )
            raise UserError(f"{path}: the key {printable(str(key))} may not stand there: {these}")
    _check_values(path, {key: value for key, value in keys.items() if key != "defaults"}, "")
    return _base(path, keys["defaults"]) if "defaults" in keys else None


def _check_package(path: Path, text: str, group: str) -> None:
    for line in text.lstrip("\ufeff").splitlines():
        if re.match(r"\s*#+\s*@", line) and line.strip().lstrip("#").split() != ["@package", GROUPS[group]]:
            allowed = f"only # @package {GROUPS[group]}" if GROUPS[group] else "no line that begins with # @"
            raise UserError(
                f"{path}: {printable(line.strip()[:100])} puts settings elsewhere: files of {group} may have {allowed}"
            )


def _base(path: Path, defaults: Any) -> str | None:
    """The one file that a file starts from, of the same group: `defaults: [NAME]`, with or without `_self_`."""
    names = [name for name in defaults if name != "_self_"] if isinstance(defaults, list) else [None]
    if len(names) > 1 or any(not isinstance(name, str) or not re.fullmatch(NAME, name) for name in names):
        raise UserError(
            f"{path}: defaults may name one other file of the same folder, such as [base, _self_], and nothing of another group"
        )
    return names[0] if names else None


def _check_values(path: Path, value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, below in value.items():
            if not isinstance(key, str):
                where = f"{path}: {place.rstrip('.')}".removesuffix(": ")
                raise UserError(f"{where}: a key that YAML reads as {_as_read(key)}: put it into quotes")
            _check_values(path, below, f"{place}{printable(key)}.")
    elif isinstance(value, list):
        for below in value:
            _check_values(path, below, place)
    elif isinstance(value, str):
        _check_interpolations(value, f"{path}: {place.rstrip('.')}")


def _as_read(key: Any) -> str:
    """What YAML makes of a key that is no text, with words that may stand in the file."""
    if isinstance(key, bool):
        return "true, such as on or yes" if key else "false, such as off or no"
    if key is None:
        return "null, such as ~"
    return f"the {'number' if isinstance(key, int | float) else 'time'} {printable(str(key))}"


def _check_interpolations(value: str, where: str) -> None:
    if "${" in ALLOWED_INTERPOLATION.sub("", value):
        raise UserError(
            f"{where}: {printable(value[:100])} may refer to another key, as ${{key}} does, and to nothing else: "
            "${oc.env:…} and the like would write down what is not in the file. Write the value."
        )


def check_composed(config: DictConfig) -> None:
    """Raises UserError where a configuration could grow without limit as it is resolved, or has a zero byte."""
    count = 0
    for place, text in texts(config):
        count += text.count("${")
        if "\0" in text and not place.startswith("data.schema."):
            raise UserError(f"configuration: {place} has a zero byte. Remove it.")
    if count > MAX_REFERENCES:
        raise UserError(f"configuration: {count} references ${{…}}, more than {MAX_REFERENCES}. Write values out.")


def check_plain(config: Any, where: str) -> None:
    """Raises UserError where a part of a configuration, which will be written down, reads more than other settings of it."""
    for place, text in texts(config):
        _check_interpolations(text, f"{where}: {place}")


def texts(config: Any) -> Iterator[tuple[str, str]]:
    """The texts of a configuration as they are written, with their places."""
    left: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while left:
        place, value = left.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, Mapping | list):
            below = value.items() if isinstance(value, Mapping) else enumerate(value)
            left += [(f"{place}.{key}".lstrip("."), part) for key, part in below]
