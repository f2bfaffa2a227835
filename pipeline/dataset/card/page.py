"""A dataset's card as one self-contained HTML page: its tables, histograms and most frequent values."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from features.printable import printable
from pipeline.dataset.card.tables import number, percent, rows_of, tables
from pipeline.dataset.manifest import Manifest

LISTED = 12  # values of an id feature

PAGE = """{% macro bars(heights, words) -%}
<svg viewBox="0 0 {{ heights | length }} 1" preserveAspectRatio="none" role="img" aria-label="histogram">
{% for height in heights -%}
<rect x="{{ loop.index0 + 0.04 }}" y="{{ 1 - height }}" width="0.92" height="{{ height }}">
<title>{{ words[loop.index0] }}</title></rect>
{% endfor %}</svg>
{%- endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{{ name }}</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem } h3 { font-size: 1rem; margin: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
th { font-weight: 600; color: #555 }
.shifted { color: #b00020; font-weight: 600 } .moves { color: #9a5b00 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(16.5rem, 1fr)); gap: 1rem }
.card { border: 1px solid #e4e4e4; border-radius: 4px; padding: .7rem .8rem; overflow: hidden }
.card p { margin: .1rem 0; color: #666; font-size: 12px }
.card .ends { display: flex; justify-content: space-between }
svg { display: block; width: 100%; height: 60px; fill: #3b6ea8 }
.value { position: relative; display: flex; justify-content: space-between; gap: 1rem; font-size: 12px; margin: 1px 0 }
.value i { position: absolute; inset: 0 auto 0 0; background: #d6e4f3 }
.value span { position: relative; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding: 0 .2rem }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>schema {{ fingerprint }}; statistics of {{ rows_of }} over {{ rows }} rows</p>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for line in table.lines %}
<tr{% if line[1] in ("moves", "shifted") %} class="{{ line[1] }}"{% endif %}>
{%- for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% if numbers %}<h2>Histograms of the middle 98% of values ({{ rows_of }})</h2>{% endif %}
<div class="cards">
{% for picture in numbers %}
<div class="card"><h3>{{ picture.name }}</h3><p>{{ picture.about }}</p>
{{ bars(picture.heights, picture.words) }}
<p class="ends"><span>{{ picture.first }}</span><span>{{ picture.last }}</span></p></div>
{% endfor %}
</div>
{% if ids %}<h2>Most frequent values ({{ rows_of }})</h2>{% endif %}
<div class="cards">
{% for picture in ids %}
<div class="card"><h3>{{ picture.name }}</h3><p>{{ picture.about }}</p>
{% if picture.heights %}{{ bars(picture.heights, picture.words) }}{% endif %}
{% for value, share in picture.listed %}
<div class="value"><i style="width: {{ "%.4f" % (100 * share) }}%"></i>
<span>{{ value }}</span><span>{{ percent(share) }}</span></div>
{% endfor %}
<p>{{ picture.rest }}</p></div>
{% endfor %}
</div>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """One feature: bars with heights in [0, 1] and tooltips, or values with their shares.

    Attributes:
        about: a line above it.
        first, last: labels below the ends of the bars.
        rest: a line below the values.
    """

    name: str
    about: str
    heights: list[float] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    first: str = ""
    last: str = ""
    listed: list[tuple[str, float]] = field(default_factory=list)
    rest: str = ""


def page_file(dataset: Path) -> Path:
    """Where jobs.inspect writes the page, unless it is given another file: beside the dataset."""
    path = dataset.resolve()
    return path.with_name(f"{path.name}.card.html")


def page_of(name: str) -> Path:
    """Where the page of a dataset is, by Dataset.name; of several days in one that of the newest day which has a page."""
    path = Path(name)
    ranges = [part.partition("..") for part in path.name.split(",")]
    days = [file.name[:10] for file in path.parent.glob("????-??-??.card.html")]
    covered = [day for day in days if any(first <= day <= (last or first) for first, _, last in ranges)]
    return page_file(path.with_name(max(covered)) if covered else path)


def page(name: str, manifest: Manifest, card: dict[str, Any]) -> str:
    """The page's HTML; raw values are escaped, and their control characters shown as escapes."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return (
        environment.from_string(PAGE)
        .render(
            name=name,
            fingerprint=manifest.fingerprint,
            rows=f"{card['rows']:,}",
            rows_of=rows_of(card),
            tables=tables(manifest, card),
            numbers=[_histogram(*item) for item in card["numbers"].items() if item[1]["histogram"]["counts"]],
            ids=[_groups(*item) if "groups" in item[1] else _values(*item) for item in card["ids"].items()],
            percent=percent,
        )
        .lstrip()
    )


def _shown(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _histogram(name: str, found: dict[str, Any]) -> Picture:
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    words = [f"{number(a)} to {number(b)}: {count:,}" for (a, b), count in zip(pairwise(edges), counts, strict=True)]
    about = f"{percent(found['missing'])} missing"
    return Picture(name, about, _heights(counts), words, first=number(edges[0]), last=number(edges[-1]))


def _groups(name: str, found: dict[str, Any]) -> Picture:
    shares, about = found["groups"], f"{percent(found['missing'])} missing"
    rest = f"hashed: shares of {len(shares)} groups of its values"
    return Picture(name, about, _heights(shares), [percent(share) for share in shares], rest=rest)


def _values(name: str, found: dict[str, Any]) -> Picture:
    listed, others = found["top"][:LISTED], found["distinct"] - LISTED
    about = f"{percent(found['missing'])} missing, {percent(found.get('unknown'))} of values unknown"
    rest = f"{percent(max(0.0, 1 - sum(share for _, share in listed)))} in {others:,} others" if others > 0 else ""
    return Picture(name, about, listed=[(value, share) for value, share in listed], rest=rest)


def _heights(counts: list[float]) -> list[float]:
    """Counts over the largest one."""
    return [round(count / max(*counts, 1e-12), 4) for count in counts]
