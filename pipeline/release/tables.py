"""A night in a terminal: its gates, changes and steps, and the last nights."""

from tabulate import tabulate

from pipeline.release.nightly import Result
from pipeline.release.trend import table as trend_table


def text(result: Result) -> str:
    """Gates, worst first, then the trend, alarms and the outcome."""
    night = result.night
    parts = []
    if gates := (night.summary("gates") or {}).get("gates"):
        keys = ("task", "slice", "gate", "candidate", "serving", "why")
        lines = [[gate["outcome"].upper(), *(gate[key] for key in keys)] for gate in gates]
        head = ["", "task", "slice", "gate", "candidate", "serving", ""]
        parts.append(tabulate(lines, head, floatfmt=".4f", missingval="-"))
    parts += [f"data  {line}" for line in (night.summary("check") or {}).get("violations", [])]
    parts.append(trend_table(result.trend))
    parts += [f"alarm  {alarm}" for alarm in result.message["alarms"]]
    if blessed := result.message["blessed"]:
        parts.append(f"serving pointer: {blessed}")
    parts.append(f"{night.outcome}: {night.why}: {result.message['record']}")
    return "\n\n".join(parts)
