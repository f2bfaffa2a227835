"""A night in a terminal: its gates and changes, what its data violates, the last nights."""

from pipeline.release.nightly import Result, verdict_of
from pipeline.release.trend import table as trend_table
from pipeline.release.verdict import table as gates_table


def text(result: Result) -> str:
    """Gates, worst first, then the data, the trend, alarms and the outcome."""
    night = result.night
    parts = []
    if verdict := verdict_of(night):
        parts.append(gates_table(verdict))
    if violations := (night.summary("check") or {}).get("violations"):
        parts.append("\n".join(f"data   {line}" for line in violations))
    parts.append(trend_table(result.trend))
    if alarms := result.message["alarms"]:
        parts.append("\n".join(f"alarm  {line}" for line in alarms))
    if blessed := result.message["blessed"]:
        parts.append(f"serving pointer: {blessed}")
    parts.append(f"{night.why}\n{result.message['record']}")
    return "\n\n".join(parts)
