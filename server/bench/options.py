"""The flags of `blockserve bench`, and the plan that follows from them."""

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from server.bench.figures import ServiceLevel, ServiceLevelError, parse_service_level
from server.bench.http_client import Address, AddressError
from server.bench.messages import Lengths, Prompt, Work
from server.bench.traffic import TrafficError, parse_lengths, read_prompts

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "OPENAI_API_KEY"
DEFAULT_CONCURRENCY = 16
DEFAULT_SECONDS = 30.0
DESCRIPTION = (
    "Load a server of OpenAI's completion API and measure it. Keeps so many requests open (--concurrency), or sends "
    "them at random moments of a given rate (--rate); several values are measured one after the other. Tokens are "
    "counted as the server reports them (usage)."
)


class OptionError(ValueError):
    """Flags that do not fit together, or a value that cannot be used. The message says which."""


class Load(NamedTuple):
    """One load of a sweep: requests kept open, or arrivals a second."""

    concurrency: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.concurrency} open" if self.concurrency else f"{self.rate:g}/s"


class Plan(NamedTuple):
    """What to measure."""

    url: str
    address: Address
    headers: dict[str, str]
    model: str | None
    loads: tuple[Load, ...]
    workers: int
    prompts: list[Prompt]
    prompt_lengths: Lengths
    output_lengths: Lengths
    lengths_shown: tuple[str, str]
    vocab_size: int
    words: bool
    streamed: bool
    ignore_eos: bool
    temperature: float
    seconds: float | None
    warm_up: float
    requests: int | None
    timeout: float
    service_level: ServiceLevel | None
    service_level_shown: str | None
    seed: int
    ceiling: bool
    with_ceiling: bool
    json: Path | None
    plot: Path | None

    def works(self, load: Load, addresses: Sequence[Address]) -> list[Work]:
        """Each worker's share of a load; with several addresses, each asks one of them in turn."""
        workers = min(self.workers, load.concurrency or self.workers, self.requests or self.workers)
        return [
            Work(
                address=addresses[number % len(addresses)],
                headers=self.headers,
                model=self.model,
                streamed=self.streamed,
                ignore_eos=self.ignore_eos,
                temperature=self.temperature,
                prompts=self.prompts,
                prompt_lengths=self.prompt_lengths,
                output_lengths=self.output_lengths,
                vocab_size=self.vocab_size,
                words=self.words,
                concurrency=_share(load.concurrency, workers, number),
                rate=load.rate / workers,
                requests=None if self.requests is None else _share(self.requests, workers, number),
                timeout_s=self.timeout,
                # Workers must not draw the same prompts: a server may remember them. They are no secret.
                seed=random.Random(f"{self.seed} {number} {load.name}").getrandbits(48),  # noqa: S311
            )
            for number in range(workers)
        ]


def _share(whole: int, workers: int, number: int) -> int:
    return whole // workers + (number < whole % workers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `blockserve bench`."""
    server = parser.add_argument_group("Server")
    server.add_argument("--url", metavar="URL", default=DEFAULT_URL, help=f"the server, also with /v1 [{DEFAULT_URL}]")
    server.add_argument("--model", metavar="NAME", help="model to ask for [the first of /v1/models]")
    server.add_argument(
        "--api-key", metavar="KEY", help=f"key to bring; in lists of processes it shows [variable {KEY_VARIABLE}]"
    )
    load = parser.add_argument_group("Load")
    kinds = load.add_mutually_exclusive_group()
    kinds.add_argument(
        "--concurrency", metavar="N", type=int, nargs="+", help=f"requests kept open [{DEFAULT_CONCURRENCY}]"
    )
    kinds.add_argument("--rate", metavar="X", type=float, nargs="+", help="requests a second (Poisson arrivals) [off]")
    load.add_argument("--seconds", metavar="X", type=float, help=f"how long to measure [{DEFAULT_SECONDS:g}]")
    load.add_argument("--warm-up", metavar="X", type=float, default=3.0, help="seconds of load before that [3]")
    load.add_argument(
        "--requests",
        metavar="N",
        type=int,
        help="send so many, and measure all of them [off: --seconds]",
    )
    load.add_argument("--timeout", metavar="X", type=float, default=600.0, help="seconds a request may take [600]")
    load.add_argument(
        "--workers", metavar="N", type=int, help="processes that ask [auto: half of the cores, 8 at most]"
    )
    load.add_argument("--seed", metavar="N", type=int, default=0, help="of prompts, lengths and moments [0]")
    content = parser.add_argument_group("Requests")
    content.add_argument(
        "--prompt-tokens", metavar="N", default="128", help="a number, a range (64-256) or mean~sigma, log-normal [128]"
    )
    content.add_argument("--output-tokens", metavar="N", default="128", help="likewise, of answers [128]")
    content.add_argument("--prompts", metavar="FILE", type=Path, help='one a line; .jsonl: {"prompt": ...} [random]')
    content.add_argument("--vocab-size", metavar="N", type=int, default=256, help="random token ids are below it [256]")
    content.add_argument("--words", action="store_true", help="random words in place of token ids [off]")
    content.add_argument("--no-stream", action="store_true", help="ask for whole answers [off]")
    content.add_argument(
        "--stop-at-eos", action="store_true", help="let answers end by themselves: no ignore_eos is sent [off]"
    )
    content.add_argument("--temperature", metavar="X", type=float, default=0.0, help="of the answers [0]")
    result = parser.add_argument_group("Result")
    result.add_argument("--slo", metavar="LIMITS", help="count answers within it: ttft=200ms,tpot=5ms,e2e=2s [off]")
    result.add_argument("--json", metavar="FILE", type=Path, help="append a line of JSON for each load [off]")
    result.add_argument("--plot", metavar="FILE", type=Path, help="draw a plot (.png, .svg); needs matplotlib [off]")
    ceilings = result.add_mutually_exclusive_group()
    ceilings.add_argument(
        "--ceiling",
        action="store_true",
        help="measure this client itself, before a server that computes nothing [off]",
    )
    ceilings.add_argument(
        "--with-ceiling", action="store_true", help="both, and mark loads that are bound by this client [off]"
    )


def read_options(options: argparse.Namespace) -> Plan:
    """The plan of parsed flags. Raises OptionError."""
    try:
        address = Address.of(options.url)
        key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE, "")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        address.head("POST", "/", headers)
        prompt_lengths, output_lengths = parse_lengths(options.prompt_tokens), parse_lengths(options.output_tokens)
        prompts = [] if options.prompts is None else read_prompts(options.prompts)
        level = None if options.slo is None else parse_service_level(options.slo)
    except (AddressError, TrafficError, ServiceLevelError) as error:
        raise OptionError(str(error)) from None
    _check(options, level)
    seconds = options.seconds if options.seconds is not None or options.requests else DEFAULT_SECONDS
    cores = len(os.sched_getaffinity(0))
    return Plan(
        url=options.url,
        address=address,
        headers=headers,
        model=options.model,
        loads=_loads(options),
        workers=options.workers or min(8, max(1, cores // 2)),
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        output_lengths=output_lengths,
        lengths_shown=(options.prompts.name if options.prompts else options.prompt_tokens, options.output_tokens),
        vocab_size=options.vocab_size,
        words=options.words,
        streamed=not options.no_stream,
        ignore_eos=not options.stop_at_eos,
        temperature=options.temperature,
        seconds=seconds,
        warm_up=0.0 if options.requests else options.warm_up,
        requests=options.requests,
        timeout=options.timeout,
        service_level=level,
        service_level_shown=options.slo,
        seed=options.seed,
        ceiling=options.ceiling,
        with_ceiling=options.with_ceiling,
        json=options.json,
        plot=options.plot,
    )


def _loads(options: argparse.Namespace) -> tuple[Load, ...]:
    if options.rate:
        return tuple(Load(rate=rate) for rate in options.rate)
    return tuple(Load(concurrency=number) for number in options.concurrency or [DEFAULT_CONCURRENCY])


def _check(options: argparse.Namespace, level: ServiceLevel | None) -> None:
    bounds: tuple[tuple[str, Sequence[float], float, float], ...] = (
        ("--concurrency", options.concurrency or (), 1, 1 << 16),
        ("--rate", options.rate or (), 1e-3, 1e6),
        ("--seconds", () if options.seconds is None else (options.seconds,), 0.1, 1e6),
        ("--warm-up", (options.warm_up,), 0, 1e6),
        ("--requests", () if options.requests is None else (options.requests,), 1, 1 << 40),
        ("--timeout", (options.timeout,), 0.001, 1e6),
        ("--workers", () if options.workers is None else (options.workers,), 1, 256),
        ("--vocab-size", (options.vocab_size,), 2, 1 << 24),
        ("--temperature", (options.temperature,), 0, 2),
    )
    for flag, values, low, high in bounds:
        for value in values:
            if not low <= value <= high:
                raise OptionError(f"{flag}: {value:g} is not from {low:g} to {high:g}")
    if options.requests and options.seconds is not None:
        raise OptionError("--requests and --seconds: give one of them")
    if level is not None and level.needs_stream and options.no_stream:
        raise OptionError("--slo: whole answers (--no-stream) show neither ttft nor tpot")
    if options.ceiling and options.rate:
        raise OptionError("--ceiling: a ceiling is that of requests kept open (--concurrency), not of a rate")
