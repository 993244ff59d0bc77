"""`blockserve batch`: completions of a file, without a server, resumable."""

import argparse
import os
import sys
from pathlib import Path

import msgspec
import uvloop

from engine.config import ModelConfig
from engine.logs import configure_logging
from engine.model_files import find_model
from server.batch.ask import Answer
from server.batch.lines import Line, survey, unanswered
from server.batch.results import OutputError, Results, continue_output, new_errors
from server.batch.run import run_batch
from server.errors import ErrorBody
from server.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, complain
from server.runtime_directory import RuntimeDirectoryError, runtime_directory
from server.settings import ServeSettings, load_settings

COMMAND = "blockserve batch"
DESCRIPTION = (
    "Answer the completion requests of a file in the format of OpenAI's batches, with engines of its own. A run that "
    "was interrupted goes on where it stopped: what has an answer in OUTPUT is not asked again. Lines that are no "
    "requests, and requests that are refused, are reported with their number and skipped."
)
SETTINGS = (
    "model",
    "served_model_name",
    "random_weights",
    "device",
    "devices",
    "dtype",
    "threads",
    "max_rows",
    "page_size",
    "max_step_positions",
    "kv_bytes",
    "memory_fraction",
    "prefix_cache",
    "max_choices",
    "max_stop_strings",
    "max_body_bytes",
    "step_timeout",
    "log_level",
    "log_format",
)
"""Those of `blockserve serve` that a batch has."""
DEFAULTS = {"log_level": "warning"}
NO_LIMIT = 1 << 20
"""The queue of a batch is as long as the batch makes it."""
REPORTS = 20
"""Lines on standard error about what was skipped; a file can have millions."""


class Report:
    """Says which lines are not answered, and why."""

    def __init__(self, path: Path, errors: Results | None) -> None:
        self._path = path
        self._errors = errors
        self.skipped = 0

    def unread(self, number: int, message: str) -> None:
        """A line that is no request."""
        self._say(number, message)
        if self._errors is not None:
            self._errors.write_unread(number, message)

    def refused(self, line: Line, answer: Answer) -> None:
        """A request that has an error for an answer."""
        self._say(line.number, msgspec.json.decode(answer.body, type=ErrorBody).error.message)
        if self._errors is not None:
            self._errors.write(line.request.custom_id, answer)

    def _say(self, number: int, message: str) -> None:
        self.skipped += 1
        if self.skipped <= REPORTS:
            sys.stderr.write(f"{self._path}:{number}: {message}\n")
        elif self.skipped == REPORTS + 1:
            sys.stderr.write("more lines were skipped; --errors FILE keeps the reason of each\n")


def run_batch_command(options: argparse.Namespace) -> int:
    """Run a batch; returns the exit code: 1 if not all was answered, 2 for what cannot be used, 130 if interrupted."""
    given = {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}
    settings = load_settings(given, os.environ, DEFAULTS).model_copy(update={"max_waiting": NO_LIMIT})
    configure_logging(settings.log_config(), "batch")
    files = [path.resolve() for path in (options.input, options.output, options.errors) if path is not None]
    if len(set(files)) < len(files):
        return complain(COMMAND, "INPUT, OUTPUT and the file of --errors have to be different files", EXIT_BAD_INPUT)
    try:
        with continue_output(options.output) as (results, answered), new_errors(options.errors) as errors:
            return _run(options.input, settings, results, answered, Report(options.input, errors))
    except OutputError as error:
        return complain(COMMAND, str(error), EXIT_BAD_INPUT)
    except RuntimeDirectoryError as error:
        return complain(COMMAND, str(error), EXIT_FAILED)
    except OSError as error:
        return complain(COMMAND, f"{error.filename or options.output}: {error.strerror}", EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(path: Path, settings: ServeSettings, results: Results, answered: set[str], report: Report) -> int:
    if path.exists() and not path.is_file():
        return complain(COMMAND, f"{path} is no regular file, and the input is read twice", EXIT_BAD_INPUT)
    try:
        found = survey(path, answered)
    except OSError as error:
        return complain(COMMAND, f"cannot read {path}: {error.strerror}", EXIT_BAD_INPUT)
    for number, message in found.bad.items():
        report.unread(number, message)
    written = 0

    def take(line: Line, answer: Answer) -> None:
        nonlocal written
        if answer.status == 200:
            results.write(line.request.custom_id, answer)
            written += 1
        else:
            report.refused(line, answer)

    stopped = None
    if found.left:
        model = find_model(settings.model)
        ModelConfig.load(model)
        with runtime_directory() as directory:
            lines = unanswered(path, answered, found.bad)
            stopped = uvloop.run(run_batch(settings, model, directory, lines, found.left, take))
    summary = f"{written} answered, {found.answered} answered before, {report.skipped} skipped"
    unasked = found.left + len(found.bad) - written - report.skipped
    sys.stderr.write(summary + (f", {unasked} left: run the same command again\n" if unasked else "\n"))
    if stopped is not None:
        return EXIT_INTERRUPTED if stopped == EXIT_DONE else EXIT_FAILED
    return EXIT_FAILED if report.skipped or unasked else 0
