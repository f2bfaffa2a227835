"""Values that end up in a manifest, each validated as a whole: none can be read as anything but one value of its field."""

import re
from decimal import Decimal
from ipaddress import ip_network
from math import ceil
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from features.printable import has_controls

# All patterns are matched whole, and their classes are ASCII: `$` would let a line break pass, \d digits of any script.
_HOST = r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = rf"((localhost|{_HOST}(\.{_HOST})+)(:[0-9]{{1,5}})?|{_HOST}:[0-9]{{1,5}})/"  # else it is part of the path
_PATH = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_IMAGE = rf"({_REGISTRY})?{_PATH}(/{_PATH})*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]{{0,127}})?"
_DIGEST = r"@sha256:[0-9a-f]{64}"
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_AMOUNT = r"(?=[0-9.]*[1-9])(0|[1-9][0-9]{0,14})(\.[0-9]{1,3})?"  # not 0
# An interpolation that looks something up outside its own configuration, or may: its name is put together.
_LOOKUP = re.compile(r"\$\{(\s*oc\.|[^:{}]*\$)")

# Fields of a cron schedule: least and greatest value, and names for those from the least on.
_CRON: dict[str, tuple[int, int, str]] = {
    "minute": (0, 59, ""),
    "hour": (0, 23, ""),
    "day of the month": (1, 31, ""),
    "month": (1, 12, "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC"),
    "day of the week": (0, 6, "SUN MON TUE WED THU FRI SAT"),
}


def _like(pattern: str, what: str, longest: int = 1000) -> AfterValidator:
    def check(text: str) -> str:
        if len(text) > longest or not re.fullmatch(pattern, text):
            raise ValueError(f"{text[:300]!r} is not {what}")
        return text

    return AfterValidator(check)


def _cron(text: str) -> str:
    """Five fields with one space between them. Raises ValueError, with the field, where they are none of Kubernetes'."""
    fields = [field for field in text.split(" ") if field]
    if len(text) > 200 or len(fields) != len(_CRON):
        raise ValueError(f"{text[:200]!r} is not a cron schedule of five fields such as '0 3 * * *'")
    for field, (name, (least, greatest, names)) in zip(fields, _CRON.items(), strict=True):
        if not all(_is_cron_part(part, least, greatest, names.split()) for part in field.split(",")):
            allowed = f"{least}-{greatest}" + (f" or {names.split()[0]}-{names.split()[-1]}" if names else "")
            raise ValueError(
                f"{text!r} is not a cron schedule: {name} {field!r} is none of *, {allowed}, a list of them, */STEP"
            )
    return " ".join(fields)


def _is_cron_part(part: str, least: int, greatest: int, names: list[str]) -> bool:
    """Whether a part is *, A or A-B, each perhaps followed by a /step; A and B within the bounds, or names."""
    found = re.fullmatch(r"(?:\*|([0-9]{1,2}|[A-Za-z]{3})(?:-([0-9]{1,2}|[A-Za-z]{3}))?)(?:/([1-9][0-9]?))?", part)
    if not found:
        return False
    numbers: list[int] = []
    for word in filter(None, found.group(1, 2)):
        if not word.isdigit() and word.upper() not in names:
            return False
        numbers.append(int(word) if word.isdigit() else least + names.index(word.upper()))
    return numbers == sorted(numbers) and all(least <= number <= greatest for number in numbers)


def _argument(text: str) -> str:
    if not re.fullmatch(r"(?s)[^=]+=.*|~.+|--.+", text):
        raise ValueError(f"{text!r} is not KEY=VALUE")
    if has_controls(re.sub(r"[\n\t]", "", text)):
        raise ValueError(f"{text!r} has control characters, or is not UTF-8")
    refuse_lookups(text)
    try:
        return _without_password(text)
    except ValueError as error:
        raise ValueError(f"{text.partition('=')[0]}: {error}") from None


def _without_password(text: str) -> str:
    if re.search(r"://[^/@\s]*:[^/@\s]+@", text):
        raise ValueError("a password in an address would be written down: hand it over as a secret")
    return text


def _one_line(text: str) -> str:
    if not text or has_controls(text):
        raise ValueError(f"{text[:300]!r} is empty, has line breaks or other control characters, or is not UTF-8")
    return text


def refuse_lookups(text: str) -> None:
    """Raises ValueError where a text holds an interpolation such as ${oc.env:NAME}, resolved here or in the pod."""
    if _LOOKUP.search(text):
        raise ValueError(
            "an interpolation of ${oc.…} would write a secret down: on Kubernetes give it by reference, "
            "+cluster.secrets.NAME=SECRET/KEY, elsewhere in the environment that jobs get"
        )


def _network(text: str) -> str:
    try:
        if not re.fullmatch(r"[0-9a-fA-F.:]+/[0-9]+", text):
            raise ValueError
        return str(ip_network(text))
    except ValueError:
        raise ValueError(f"{text!r} is not a network such as 10.1.0.0/16 (no bits set after the prefix)") from None


UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
UNITS |= {f"{letter}i": 1 << 10 * power for power, letter in enumerate("KMGTP", start=1)}


def amount(quantity: str) -> Decimal:
    """The number of a Kubernetes quantity: CPUs of 500m, bytes of 16Gi."""
    if quantity.endswith("m"):
        return Decimal(quantity[:-1]) / 1000
    digits = quantity.rstrip("kKMGTPi")
    return Decimal(digits) * UNITS[quantity.removeprefix(digits)]


def whole_cpus(cpu: str) -> int:
    """CPUs of a quantity, rounded up, for a scheduler of whole ones."""
    return ceil(amount(cpu))


def mebibytes(memory: str) -> int:
    """MiB of a quantity of bytes, rounded up."""
    return ceil(amount(memory) / 2**20)


def is_pinned(image: str) -> bool:
    """Whether an image is named by its digest, which no push can change."""
    return re.search(_DIGEST, image) is not None


class NodeRange(NamedTuple):
    """How many nodes a workload runs on: it needs `least`, and takes up to `most`."""

    least: int
    most: int

    @property
    def is_elastic(self) -> bool:
        """Whether it goes on with fewer than it may have."""
        return self.least < self.most

    def __str__(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least}..{self.most}"


def _nodes(value: Any) -> NodeRange:
    """Of a number, or of MIN..MAX."""
    if isinstance(value, NodeRange):
        return value
    found = re.fullmatch(r"([1-9][0-9]{0,4})(?:\.\.([1-9][0-9]{0,4}))?", str(value))
    if not found:
        raise ValueError(f"{value!r} is not a number of nodes, or MIN..MAX such as 2..8")
    least = int(found[1])
    most = int(found[2] or least)
    if least > most:
        raise ValueError(f"{value}: the first number is the larger one")
    return NodeRange(least, most)


# 52 characters: a CronJob appends eleven to its own.
Label = Annotated[
    str,
    _like(
        r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?",
        "a DNS label: lower-case letters, digits and '-', a letter first, at most 52 characters",
    ),
]
Namespace = Annotated[str, _like(_LABEL, "a namespace: lower-case letters, digits and '-', at most 63 characters")]
ObjectName = Annotated[
    str, _like(rf"{_LABEL}(\.{_LABEL})*", "a name of lower-case letters, digits, '-' and '.'", longest=253)
]
Cpu = Annotated[str, _like(rf"{_AMOUNT}m?", "a Kubernetes quantity of CPUs such as 4 or 500m")]
Bytes = Annotated[str, _like(rf"{_AMOUNT}(k|[KMGTP]i|[MGTP])?", "a Kubernetes quantity of bytes such as 16Gi")]
Cron = Annotated[str, AfterValidator(_cron)]
Nodes = Annotated[NodeRange, BeforeValidator(_nodes), PlainSerializer(str, str)]
Value = Annotated[str, AfterValidator(_without_password)]
Argument = Annotated[str, AfterValidator(_argument)]
OneLine = Annotated[str, AfterValidator(_one_line)]
Network = Annotated[str, AfterValidator(_network)]
Image = Annotated[
    str, _like(f"{_IMAGE}({_DIGEST})?", "an image such as registry.example/taskfuse@sha256:DIGEST", longest=455)
]
_PREFIX = rf"(?=[^/]{{1,253}}/){_LABEL}(\.{_LABEL})*/"
_LABEL_WORD = r"[a-zA-Z0-9]([-._a-zA-Z0-9]{0,61}[a-zA-Z0-9])?"
LabelKey = Annotated[
    str, _like(rf"({_PREFIX})?{_LABEL_WORD}", "the key of a label such as topology.kubernetes.io/zone")
]
LabelValue = Annotated[
    str, _like(rf"({_LABEL_WORD})?", "the value of a label: at most 63 letters, digits, '-', '_', '.'")
]
DeviceName = Annotated[str, _like(rf"{_PREFIX}{_LABEL_WORD}", "a resource of nodes such as vpc.amazonaws.com/efa")]
Variable = Annotated[str, _like(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "the name of an environment variable")]
SlurmNames = Annotated[
    str, _like(r"[A-Za-z0-9_][-A-Za-z0-9_.,]*", "a name in Slurm, or several with commas", longest=255)
]
SlurmFeatures = Annotated[
    str, _like(r"[-A-Za-z0-9_.,&|!*()\[\]]+", "a constraint of features such as a100&ib, without spaces", longest=255)
]
SlurmGpus = Annotated[str, _like(r"[A-Za-z0-9_]+(:[-A-Za-z0-9_.]+)?", "a gres such as gpu or gpu:h100", longest=100)]
# sbatch reads paths before any shell does: no white space, no quotes, and no %, which it replaces.
SlurmFolder = Annotated[str, _like(r"[-A-Za-z0-9_./+@:,=]+", "a path of letters, digits and -_./+@:,=")]
SecretKey = Annotated[
    str,
    _like(
        rf"(?=[^/]{{1,253}}/){_LABEL}(\.{_LABEL})*/(?!\.\.)(?!\.$)[-._a-zA-Z0-9]{{1,253}}",
        "SECRET/KEY: the name of a Secret and a key of it",
    ),
]
