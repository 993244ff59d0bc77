"""The command `blockserve`: serve, generate, batch, eval, bench, version."""

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import engine
from engine.config import ConfigError
from engine.evaluate import HEADER, PLAIN_END, read_documents, table
from engine.tokenizer import TokenizerError
from engine.types import InvalidRequestError, SamplingParams
from server.batch.command import DESCRIPTION as BATCH_DESCRIPTION
from server.batch.command import SETTINGS as BATCH_SETTINGS
from server.batch.command import run_batch_command
from server.bench.command import run_bench
from server.bench.options import DESCRIPTION as BENCH_DESCRIPTION
from server.bench.options import add_arguments as add_bench_arguments
from server.exit_codes import EXIT_BAD_INPUT, EXIT_INTERRUPTED, complain
from server.service import serve
from server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, GROUPS, ServeSettings, flag_name, load_settings
from server.version import version_info

SERVE_DESCRIPTION = (
    "Serve a Block Transformer over HTTP, to clients of the OpenAI completion API. Every setting may also come from "
    f"the environment ({ENVIRONMENT_PREFIX}MAX_ROWS for --max-rows) or from a TOML file (max-rows = 64); a flag wins "
    "over the environment, and the environment over the file."
)
MODEL_SETTINGS = ("model", "random_weights", "device", "dtype")
"""The settings that `generate` and `eval` share with `serve`."""
DEFAULT_PROMPT = "Once upon a time"


class _Help(argparse.HelpFormatter):
    """Flags on the left, what they do on the right, in lines of a readable width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 110))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (None: that of this process); returns the exit code."""
    options = build_parser().parse_args(arguments)
    commands = {
        "serve": run_serve,
        "generate": run_generate,
        "batch": run_batch_command,
        "eval": run_eval,
        "bench": run_bench,
        "version": run_version,
    }
    try:
        return commands[options.command](options)
    except (ConfigError, TokenizerError) as error:
        return complain("blockserve", str(error), EXIT_BAD_INPUT)
    except InvalidRequestError as error:
        return complain("blockserve", error.message.removeprefix("prompt 0: "), EXIT_BAD_INPUT)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="blockserve", description="An inference server for Block Transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(
        commands.add_parser(
            "serve",
            usage="blockserve serve [OPTION ...]",
            help="serve a model over HTTP",
            description=SERVE_DESCRIPTION,
            formatter_class=_Help,
        )
    )
    _add_generate(
        commands.add_parser(
            "generate",
            usage="blockserve generate [OPTION ...] [PROMPT]",
            help="write a text in the terminal, without a server",
            description="Continue a prompt and print the text block by block as it is written.",
            formatter_class=_Help,
        )
    )
    _add_batch(
        commands.add_parser(
            "batch",
            usage="blockserve batch [OPTION ...] INPUT -o OUTPUT",
            help="answer the requests of a file, without a server",
            description=BATCH_DESCRIPTION,
            formatter_class=_Help,
        )
    )
    add_bench_arguments(
        commands.add_parser(
            "bench",
            usage="blockserve bench [OPTION ...]",
            help="load a server and measure it",
            description=BENCH_DESCRIPTION,
            formatter_class=_Help,
        )
    )
    _add_eval(
        commands.add_parser(
            "eval",
            usage="blockserve eval [OPTION ...] FILE...",
            help="measure how well a model predicts texts",
            description="Print loss (nats a token) and bits per byte of the documents in text files. A document is "
            "closed by a line that holds the end-of-text token alone; files may be compressed with xz.",
            formatter_class=_Help,
        )
    )
    commands.add_parser("version", help="print the version", description="Print version and commit.")
    return parser


def run_serve(options: argparse.Namespace) -> int:
    """`blockserve serve`: until it is told to stop."""
    given = {name: value for name, value in vars(options).items() if name != "command"}
    return serve(load_settings(given, os.environ))


def run_generate(options: argparse.Namespace) -> int:
    """`blockserve generate`: print the prompt and what the model makes of it."""
    params = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=options.seed,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos,
    )
    # What a model and a device are is said as for `serve`: by flag, environment or file.
    given = {name: getattr(options, name) for name in MODEL_SETTINGS if hasattr(options, name)}
    settings = load_settings(given, os.environ)
    llm = engine.LLM(settings.model, random_seed=settings.random_weights, device=settings.device, dtype=settings.dtype)
    texts = llm.stream(options.prompt, params)
    try:
        # The first text comes before the prompt is printed: nothing is printed of a request that is refused.
        for text in itertools.chain([options.prompt + next(texts, "")], texts):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read has had enough. What Python would still flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run_eval(options: argparse.Namespace) -> int:
    """`blockserve eval`: loss and bits per byte by document, as tab-separated lines."""
    given = {name: getattr(options, name) for name in MODEL_SETTINGS if hasattr(options, name)}
    settings = load_settings(given, os.environ)
    llm = engine.LLM(settings.model, random_seed=settings.random_weights, device=settings.device, dtype=settings.dtype)
    end = llm.tokenizer.eos_token or PLAIN_END
    files = [(path, read_documents(path, end)[: options.limit]) for path in options.files]
    sys.stdout.write(HEADER + "\n")
    for path, documents in files:
        for line in table(path.name, llm.evaluate(documents, padding=options.padding), each=not options.summary):
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


def run_version(options: argparse.Namespace) -> int:  # noqa: ARG001 - every command takes the options
    """`blockserve version`."""
    info = version_info()
    commit = f" ({info.commit[:12]})" if info.commit else ""
    sys.stdout.write(f"blockserve {info.version}{commit}\n")
    return 0


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"TOML file with settings (environment: {CONFIG_VARIABLE})",
    )
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for name in ServeSettings.model_fields:
            if _group_of(name) == group:
                _add_setting(section, name)


def _add_setting(parser: argparse._ArgumentGroup | argparse.ArgumentParser, name: str) -> None:
    """The flag of one field. Values stay text: the settings model reads them, as it does those of the environment."""
    field = ServeSettings.model_fields[name]
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    default = extra["shown"] if extra["shown"] is not None else field.default
    # argparse formats help texts with %.
    text = f"{field.description} [{default}]".replace("%", "%%")
    metavar = str(extra["metavar"])
    if field.default is True:
        parser.add_argument(
            flag_name(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    elif field.default is False:
        parser.add_argument(flag_name(name), action="store_const", const="true", default=argparse.SUPPRESS, help=text)
    elif isinstance(field.default, tuple):
        parser.add_argument(
            flag_name(name), nargs="+", action="extend", metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    else:
        parser.add_argument(flag_name(name), metavar=metavar, default=argparse.SUPPRESS, help=text)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingParams(max_tokens=200)
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", default=DEFAULT_PROMPT, help=f'the text to continue ["{DEFAULT_PROMPT}"]'
    )
    sampling = parser.add_argument_group("Sampling")
    numbers: tuple[tuple[str, type[int] | type[float], str, str], ...] = (
        ("max_tokens", int, "N", "tokens to write at most"),
        ("temperature", float, "X", "0 takes the most likely token every time; up to 2"),
        ("top_p", float, "X", "share of the probability to choose from; 1 is off"),
        ("top_k", int, "N", "number of tokens to choose from; 0 is off"),
        ("min_p", float, "X", "least probability relative to the most likely token; 0 is off"),
    )
    for name, kind, metavar, text in numbers:
        default = getattr(defaults, name)
        sampling.add_argument(flag_name(name), type=kind, metavar=metavar, default=default, help=f"{text} [{default}]")
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same text [random]")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", default=[], help="end before this text; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model ended its text")
    section = parser.add_argument_group("Model and device")
    for name in MODEL_SETTINGS:
        _add_setting(section, name)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="INPUT", help="requests, a JSON object a line")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUTPUT",
        required=True,
        help="answers, a line each; added to, never written over",
    )
    parser.add_argument(
        "--errors", type=Path, metavar="FILE", help="what was skipped in this run, a line each [not kept]"
    )
    for group in GROUPS:
        names = [name for name in BATCH_SETTINGS if _group_of(name) == group]
        section = parser.add_argument_group(group)
        for name in names:
            _add_setting(section, name)


def _group_of(setting: str) -> object:
    extra = ServeSettings.model_fields[setting].json_schema_extra
    return extra["group"] if isinstance(extra, dict) else None


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="documents, as UTF-8")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each file only [all]")
    parser.add_argument(
        "--padding",
        type=int,
        metavar="N",
        help="pads in front of each text, fewer than a block; the first block is not predicted "
        "[what predicts every token but the first]",
    )
    parser.add_argument("--summary", action="store_true", help="one line a file, none for its documents")
    section = parser.add_argument_group("Model and device")
    for name in MODEL_SETTINGS:
        _add_setting(section, name)


if __name__ == "__main__":
    sys.exit(main())
