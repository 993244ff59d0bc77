"""Logging of every process: one line a record on standard error, plain for people or JSON for machines.

Fields go in `extra`: `log.info("request done", extra={"id": 7})`. Nothing that a client sends can start a line of its
own or reach the terminal as a control character.
"""

import json
import logging
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from engine.process_config import LogConfig

OUR_PACKAGES = ("server", "engine", "kernels", "__main__")
"""Loggers that follow the configured level; libraries are heard from warnings upwards."""

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def configure_logging(config: LogConfig, process: str, stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (standard error), replacing what was configured before.

    `process` names the process in every line ("supervisor", "engine 0").
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter(process) if config.format == "json" else PlainFormatter(process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(config.level.upper())


class PlainFormatter(logging.Formatter):
    """`12:34:56 INFO supervisor message key=value`, in local time; tracebacks follow, indented."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and an indented one for each of its traceback."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        parts = [clock, f"{record.levelname:<7}", self._process, escape(record.getMessage())]
        parts += [f"{escape(name)}={_plain_value(value)}" for name, value in extra_fields(record).items()]
        line = " ".join(parts)
        trace = self._trace(record)
        return "\n".join([line, *("    " + escape(part) for part in trace.splitlines())])

    def _trace(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return trace + ("\n" + record.stack_info if record.stack_info else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, process, logger, message, the extra fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line. An extra field never replaces one of the five that every line has."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in extra_fields(record).items():
            entry.setdefault(name, _json_value(value))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}


def escape(text: str) -> str:
    """The text with everything that is not printable (line breaks, control characters, lone surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _plain_value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else escape(str(value))
    if not text or any(char in text for char in ' "='):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _json_value(value: object) -> object:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return str(value)
