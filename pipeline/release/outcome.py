"""How a night is announced: one JSON line, a message for a pager, a webhook."""

import logging
import os
from pathlib import Path
from typing import Any

from features.errors import UserError
from features.printable import printable
from features.regular_files import open_regular
from pipeline.release import serving
from pipeline.release.config import NightlyConfig
from pipeline.release.night import FILE, Night
from pipeline.release.trend import Alarm
from pipeline.release.webhook import post

TERMINATION_LOG = Path("/dev/termination-log")  # where Kubernetes reads the message of a container that ended
MAX_MESSAGE_BYTES = 4096  # that it keeps
MOST = 10  # gates and alarms in a message
LONGEST = 300  # characters of each

logger = logging.getLogger(__name__)


def message_of(config: NightlyConfig, night: Night, alarms: list[Alarm]) -> dict[str, Any]:
    """The JSON line of a night that was judged: outcome, exit_code, why, models, gates not passed, alarms, record."""
    gates = (night.summary("gates") or {}).get("gates", [])
    blessed = night.summary("bless")
    return {
        "date": night.date,
        "outcome": night.outcome,
        "exit_code": night.exit_code,
        "why": night.why,
        **{
            role: scored.model.model_dump() if (scored := night.scored(role)) else None
            for role in ("candidate", "serving")
        },
        "not_passed": [_gate(gate) for gate in gates if gate["outcome"] != "pass"][:MOST],
        "data": (night.summary("check") or {}).get("violations", []),
        "blessed": blessed["what"] if blessed else _still_serves(config, night),
        "alarms": [str(alarm)[:LONGEST] for alarm in alarms[:MOST]],
        "record": str((config.folder / FILE).absolute()),
    }


def error_message(config: NightlyConfig, error: BaseException) -> dict[str, Any]:
    """The JSON line of a night, or of `bless=back`, that ended with an error."""
    why = printable(" ".join(str(error).split()))[:1000] or type(error).__name__
    file = config.out / serving.FILE if config.bless == "back" else config.folder / FILE
    record = str(file.absolute())
    return {"date": config.date, "outcome": "error", "exit_code": 1, "why": f"error: {why}", "record": record}


def announce(config: NightlyConfig, message: dict[str, Any], url: str | None) -> None:
    """Writes the message for a pager, and posts it where there is a webhook. Failures are warnings.

    Args:
        url: see pipeline.release.webhook.
    """
    path = config.termination_message or TERMINATION_LOG
    if config.termination_message or (path.exists() and os.access(path, os.W_OK)):
        try:
            write_message(path, pager_text(message))
        except (OSError, UserError) as error:
            logger.warning("%s: the outcome is not written there: %s", path, error)
    if url:
        post(url, message)


def pager_text(message: dict[str, Any]) -> str:
    """The message in a few lines, the worst first, of MAX_MESSAGE_BYTES at most."""
    lines = [
        f"night {message['date']}: {message['why']}",
        *message.get("not_passed", []),
        *(f"data: {line}" for line in message.get("data", [])),
        *(f"alarm: {line}" for line in message.get("alarms", [])),
        *([f"serving pointer: {message['blessed']}"] if message.get("blessed") else []),
        message["record"],
    ]
    text = "\n".join(printable(line) for line in lines).encode()
    return text[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def write_message(path: Path, text: str) -> None:
    """Writes in place: what Kubernetes mounts there cannot be replaced by a rename. Raises OSError, UserError for a link."""
    with open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "wb") as file:
        file.write(text.encode())


def _still_serves(config: NightlyConfig, night: Night) -> str | None:
    """Of a night that has not passed: whether what it blessed, before it was judged again, serves, and how to end that."""
    if night.outcome == "pass":
        return None
    try:
        pointer = serving.read_serving(config.out)
    except UserError as error:
        logger.warning("what serves is not known: %s", error)
        return None
    if pointer is None or pointer.night != night.date:
        return None
    again = f"bless=back withdraw={night.date}"
    return f"{pointer.model}, which this night blessed before it was judged again, still serves: {again} takes it back"


def _gate(gate: dict[str, Any]) -> str:
    where = "" if gate["slice"] == "all" else f" {gate['slice']}"
    return f"{gate['outcome']}: {gate['task']}{where} {gate['gate']}: {gate['why']}"[:LONGEST]
