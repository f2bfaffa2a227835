"""The OpenAPI description of a server, and a page of it that loads nothing from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.serving.http.packages import Loaded

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}pre{background:#f4f4f4;padding:1em;overflow:auto}"
    "table{border-collapse:collapse}th,td{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}"
)
REQUEST = '{"user": {COLUMN: VALUE that all candidates share, ...}, "candidates": [{COLUMN: VALUE, ...}, ...]}'
ANSWER = '{"model": {"run": ..., "step": ..., "checkpoint": ..., "package": ...}, "scores": {TASK: [NUMBER of each candidate]}}'
NUMBERS = {"type": "array", "items": {"type": ["number", "null"]}}


def schemas(loaded: Loaded) -> dict[str, Any]:
    """The schemas of bodies: a row as the package that serves takes it, a request, an answer, an error."""
    row = {"type": "object", "properties": loaded.scorer.requests.describe(), "additionalProperties": False}
    identity = {
        name: {"type": "integer" if isinstance(value, int) else "string"} for name, value in loaded.identity.items()
    }
    scores = {
        task: NUMBERS | {"description": "probabilities" if kind == "binary" else "predictions in the label's unit"}
        for task, kind in loaded.scorer.manifest.tasks.items()
    }
    return {
        "Row": row,
        "Request": {
            "type": "object",
            "required": ["candidates"],
            "additionalProperties": False,
            "properties": {
                "user": {"$ref": "#/components/schemas/Row", "description": "values that all candidates share"},
                "candidates": {"type": "array", "items": {"$ref": "#/components/schemas/Row"}},
            },
        },
        "Answer": {
            "type": "object",
            "properties": {
                "model": {"type": "object", "properties": identity},
                "scores": {"type": "object", "properties": scores},
            },
        },
        "Error": {"type": "object", "properties": {"error": {"type": "string"}}},
    }


def page(openapi: dict[str, Any]) -> str:
    """An HTML page of an OpenAPI description: its routes, the columns of a row, the scores of an answer."""
    found = openapi["components"]["schemas"]
    routes = [
        (f"{method.upper()} {path}", str(details.get("summary", "")), str(details.get("description", "")))
        for path, methods in openapi["paths"].items()
        for method, details in methods.items()
    ]
    columns = [
        (name, types(each), str(each.get("description", ""))) for name, each in found["Row"]["properties"].items()
    ]
    scores = found["Answer"]["properties"]["scores"]["properties"]
    tasks = [(name, str(each.get("description", ""))) for name, each in scores.items()]
    title = escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><h2>Routes</h2>{table(('route', '', ''), routes)}"
        f"<h2>POST /score</h2><p>Request</p><pre>{escape(REQUEST)}</pre><p>Answer</p><pre>{escape(ANSWER)}</pre>"
        f"<h2>Columns of a row</h2><p>Each may be left out, or null.</p>{table(('column', 'types', ''), columns)}"
        f"<h2>Tasks</h2>{table(('task', 'scores'), tasks)}"
        '<p>All of it for programs: <a href="/openapi.json">OpenAPI</a></p></html>'
    )


def types(schema: dict[str, Any]) -> str:
    """The types of a column, such as "number, string", without null."""
    given = schema.get("type", "any")
    names = [name for name in ([given] if isinstance(given, str) else given) if name != "null"]
    inner = f"array of ({types(schema['items'])})" if "items" in schema else "array"
    return ", ".join(inner if name == "array" else name for name in names)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; of each row the first cell is code."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><td><code>{escape(first)}</code></td>{''.join(f'<td>{escape(each)}</td>' for each in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
