"""The page of a run, of a comparison of runs, of a night or of many nights: one self-contained HTML file, from one template.

It loads nothing and runs only the script whose hash it names; texts of data are escaped, their control characters shown.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from features.errors import UserError
from features.printable import printable
from pipeline.evaluation.report import course, mixture, plots, quality, reliability, settings, slices, trend
from pipeline.evaluation.report.blocks import Section
from pipeline.evaluation.report.content import Judgement, Model, Night, Trend
from pipeline.evaluation.report.numbers import count, percent
from pipeline.evaluation.report.reading import model_of
from pipeline.evaluation.report.results import Results
from pipeline.storage.files import make_folder, write_text

FOLDER = Path(__file__).parent
DEFINITIONS = (
    "NE: log loss over the entropy of the base rate (He et al. 2014). NRMSE: root mean squared error over the standard "
    "deviation of the label. Of both 1 is no better than predicting the mean label, and lower is better."
)


def write_run(results: Results, baseline: Model | None = None, defaults: Mapping[str, Any] | None = None) -> None:
    """Writes the run's report.html, and ne.png beside it.

    Args:
        baseline: another model to compare it with, such as the one that is serving.
        defaults: of training settings, which it is compared with where there is no baseline.
    Raises:
        UserError: a file of the run is damaged.
    """
    plots.write_curves(results)
    write_text(results.run.report, run_page(replace(model_of(results), defaults=defaults), baseline))


def write_comparison(models: Sequence[Model], baseline: Model | None, file: Path, note: str = "") -> None:
    """Writes the page of models side by side; the baseline is one of them. All have the same tasks. note: below the title."""
    make_folder(file.parent)
    write_text(file, comparison_page(models, baseline, note))


def write_night(night: Night, file: Path) -> None:
    """Writes the page of a night: its verdict, and the candidate against what is serving."""
    write_text(file, night_page(night))


def write_trend(nights: Trend, file: Path) -> None:
    """Writes the page of many nights."""
    dates = [night.date for night in nights.nights]
    about = f"{count(len(dates))} nights, {dates[0]} to {dates[-1]}" if dates else "no nights"
    write_text(file, sections_page("Trend of nights", nights.name, about, trend.sections(nights) if dates else []))


def run_page(model: Model, baseline: Model | None = None, judgement: Judgement | None = None) -> str:
    """The page of one model."""
    named = named_apart([model, baseline])[1] if baseline else None
    return sections_page("Run", model.name, _about(model), _answers([model], named, judgement))


def comparison_page(models: Sequence[Model], baseline: Model | None, note: str = "") -> str:
    """The page of models side by side."""
    apart = named_apart(models)
    chosen = next((new for new, old in zip(apart, models, strict=True) if old is baseline), None)
    names = ", ".join(model.name for model in apart)
    about = f"{_rows(apart[0])}. {note}".strip()
    return sections_page("Comparison", names, about, _answers(apart, chosen))


def named_apart(models: Sequence[Model]) -> list[Model]:
    """The models, those that share a name with its number among them added: "adatt (2)"."""
    seen: Counter[str] = Counter()
    found = []
    for model in models:
        seen[model.name] += 1
        number = seen[model.name]
        found.append(model if number == 1 else replace(model, name=f"{model.name} ({number})"))
    return found


def night_page(night: Night) -> str:
    """The page of a night."""
    model, other = night.candidate, night.serving or night.best
    baseline = named_apart([model, other])[1] if other else None
    sections = _answers([model], baseline, night.judgement, night)
    about = f"{model.name}{f' against {baseline.name}' if baseline else ''}. {_about(model)}"
    return sections_page("Night", night.date, about, sections)


def _answers(
    models: Sequence[Model], baseline: Model | None, judgement: Judgement | None = None, night: Night | None = None
) -> list[Section]:
    """The sections, in the order of a page. Raises UserError for models of unlike tasks."""
    beside = [baseline] if baseline and baseline not in models else []
    for model in (*models, *beside):
        if model.kinds != models[0].kinds:
            raise UserError(
                f"{models[0].name} predicts {', '.join(models[0].kinds)}, {model.name} predicts {', '.join(model.kinds)}: only "
                "models of the same tasks can be compared"
            )
    run = settings.section([*models, *beside], baseline)
    if night:
        run = settings.with_steps(run, night.steps)
    if not any(model.records for model in models):
        return [Section("good", "Is it good?", "No checkpoint has been evaluated yet."), run]
    return [
        quality.section(models, baseline, judgement, night.checks if night else ()),
        reliability.section([*models, *beside]),
        slices.section(models, baseline),
        course.section([*models, *beside] if len(models) > 1 else models, baseline),
        mixture.section(models),
        run,
    ]


def _about(model: Model) -> str:
    if not model.records:
        return f"{_rows(model)}. No checkpoint has been evaluated yet."
    step, rows = count(model.last["step"]), count(model.last["rows"])
    return f"{_rows(model)}; step {step}, after {rows} training rows."


def _rows(model: Model) -> str:
    """Which rows were scored."""
    share = model.last.get("share") or 1.0
    return f"{f'{percent(share)} of split' if share < 1 else 'Split'} {model.split} of {model.dataset}"


def sections_page(kind: str, title: str, about: str, sections: Sequence[Section], footer: str = DEFINITIONS) -> str:
    """A page of sections; kind stands above its title, about below it, and the footer defines its terms."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return _template().render(
        kind=kind, title=title, about=about, sections=sections, footer=footer,
        style=Markup(style), script=Markup(script), style_hash=_hash(style), script_hash=_hash(script),
    )  # fmt: skip


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    return environment.get_template("page.html")


def _hash(text: str) -> str:
    """What a content security policy allows an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
