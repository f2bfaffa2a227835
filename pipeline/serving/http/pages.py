"""The OpenAPI description of a server, and a page of it that loads nothing from elsewhere."""

import json
from html import escape
from typing import Any

from pipeline.serving.http.packages import Loaded

STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}pre{background:#f4f4f4;padding:1em;overflow:auto}"
NUMBERS = {"type": "array", "items": {"type": "number", "nullable": True}}


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
    """An HTML page of an OpenAPI description: its routes, the columns of a row, the description itself."""
    routes = "".join(
        f"<li><code>{escape(method.upper())} {escape(path)}</code> {escape(str(details.get('summary', '')))}</li>"
        for path, methods in openapi["paths"].items()
        for method, details in methods.items()
    )
    found = openapi.get("components", {}).get("schemas", {})
    columns = "".join(
        f"<li><code>{escape(name)}</code> {escape(json.dumps(schema, ensure_ascii=False))}</li>"
        for name, schema in found.get("Row", {}).get("properties", {}).items()
    )
    text = escape(json.dumps(openapi, indent=2, ensure_ascii=False))
    title = escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><ul>{routes}</ul><h2>Columns of a row</h2><ul>{columns}</ul>"
        f'<h2><a href="/openapi.json">OpenAPI</a></h2><pre>{text}</pre></html>'
    )
