"""The report of a run: one page that holds its tables and pictures, and the pictures as files beside it."""

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from features.printable import printable
from pipeline.evaluation.report.plots import expert_heat_map, learning_curves
from pipeline.evaluation.report.results import Results
from pipeline.evaluation.report.tables import table
from pipeline.storage.files import write_text


def write(results: Results) -> None:
    """Writes report.html, which is self-contained, ne.png, and gates.png for a model with gates."""
    run = results.run
    image = _save(learning_curves(results), run.path / "ne.png")
    gate_image = ""
    if results.records and (means := results.records[-1].get("gates")):
        encoded = _save(expert_heat_map(means, list(results.kinds)), run.path / "gates.png")
        gate_image = f"""<p>Mean weight of each expert, step {results.records[-1]["step"]:,}.</p>
<img alt="mean gate weights" src="data:image/png;base64,{encoded}">"""
    name = _text(str(run.path))
    page = f"""<!doctype html><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{name}</title>
<style>
body {{ font: 15px sans-serif; margin: 2em; }}
td, th {{ padding: .2em .8em; text-align: right; }}
img {{ max-width: 100%; }}
</style>
<h1>{name}</h1>
<p>Split {results.split} of {_text(results.dataset)}.
NE: log loss over the entropy of the base rate; 1 is no better than the base rate, lower is better.</p>
<img alt="NE over rows seen" src="data:image/png;base64,{image}">
{gate_image}
{table(results, "html").replace(chr(10), " ")}
"""
    write_text(run.report, page)


def _text(text: str) -> str:
    return html.escape(printable(text))


def _save(figure: Figure, path: Path) -> str:
    """Saves a picture as PNG and returns it in base64."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path.write_bytes(image.getvalue())
    return base64.b64encode(image.getvalue()).decode()
