"""Log lines, plain and JSON."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from engine.logs import JsonFormatter, PlainFormatter, configure_logging
from engine.process_config import LogConfig


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "server.x", "levelname": "INFO", "levelno": 20, "msg": message, "args": args})
    vars(made).update(extra)
    return made


def plain(made: logging.LogRecord) -> str:
    return PlainFormatter("engine 0").format(made)


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter("engine 0").format(made)
    assert "\n" not in line
    decoded = json.loads(line)
    assert isinstance(decoded, dict)
    return decoded


def failed() -> logging.LogRecord:
    try:
        raise ValueError("first\nINFO forged")
    except ValueError as error:
        made = record("it failed")
        made.exc_info = (ValueError, error, error.__traceback__)
        return made


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts the root logger back as pytest had it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for package in ("server", "engine", "kernels", "__main__"):
        logging.getLogger(package).setLevel(logging.NOTSET)


def test_a_plain_line_has_time_level_process_message_and_fields() -> None:
    line = plain(record("request %s", "done", id=7, seconds=0.123456789, model="a b", empty=""))
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d INFO    engine 0 request done id=7 seconds=0\.123457 model="a b" empty=""', line
    )


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "a\x1b[31mb", "a\u2028b", "a\x00b", "a\udc80b"])
def test_no_text_breaks_a_plain_line_or_reaches_the_terminal_raw(hostile: str) -> None:
    line = plain(record(hostile, value=hostile, **{hostile: 1}))
    assert line.isprintable()
    assert "\\" in line


def test_quotes_in_a_value_cannot_forge_a_field() -> None:
    assert plain(record("m", a='x" b="y')).endswith(r'm a="x\" b=\"y"')


def test_a_traceback_is_indented_so_that_it_cannot_pass_for_a_line() -> None:
    first, *rest = plain(failed()).split("\n")
    assert first.endswith("it failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)
    assert any("INFO forged" in line for line in rest)


def test_a_json_line_has_utc_time_level_process_message_and_fields() -> None:
    entry = as_json(record("request %s", "done", id=7, ratio=0.5, ids=[1, "x"], none=None, path=OSError("x")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {
        "level": "info", "process": "engine 0", "logger": "server.x", "message": "request done",
        "id": 7, "ratio": 0.5, "ids": [1, "x"], "none": None, "path": "x",
    }  # fmt: skip


def test_json_stays_json_for_newlines_infinities_and_broken_unicode() -> None:
    entry = as_json(record("a\nb", value="\udc80\x1b", rate=float("inf"), bad=float("nan")))
    assert (entry["message"], entry["value"], entry["rate"], entry["bad"]) == ("a\nb", "\udc80\x1b", "inf", "nan")


def test_a_field_cannot_replace_what_every_json_line_has() -> None:
    assert as_json(record("m", level="fatal", process="other"))["level"] == "info"


def test_a_json_exception_is_a_field() -> None:
    assert "ValueError: first\nINFO forged" in as_json(failed())["exception"]


@pytest.mark.usefixtures("restored")
def test_our_loggers_follow_the_level_and_libraries_only_warn() -> None:
    stream = io.StringIO()
    configure_logging(LogConfig(level="debug"), "supervisor", stream)
    logging.getLogger("server.children").debug("ours")
    logging.getLogger("uvicorn.error").info("theirs")
    logging.getLogger("uvicorn.error").warning("their warning")
    lines = stream.getvalue().splitlines()
    assert [line.split(" supervisor ")[1] for line in lines] == ["ours", "their warning"]


@pytest.mark.usefixtures("restored")
def test_configuring_again_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(LogConfig(), "supervisor", first)
    configure_logging(LogConfig(level="error", format="json"), "supervisor", second)
    logging.getLogger("engine.core").warning("hidden")
    logging.getLogger("engine.core").error("shown")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["message"] == "shown"
