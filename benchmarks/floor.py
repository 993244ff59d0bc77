"""The floor of a workload: its matrix products and one reading of its KV, one after the other, nothing else.

Measured on the device at hand, with random operands. CUDA launches nothing in between: the products of a step are one
graph.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.models import Workload
from engine.config import BlockTransformerConfig, DecoderConfig, ModelConfig

COPIES = 16
"""Copies in a row that the bandwidth is taken from: one takes 0.7 ms of a GPU, and waiting for it a tenth as long."""
PREFILL_POSITIONS = 16384
"""Positions at which the products of prefill are timed: a full step of a GPU's default budget."""

Product = tuple[int, int, int]
"""(rows, in, out) of one matrix product."""


@dataclass(frozen=True)
class DeviceFloor:
    """What a model's parts cost at the least on one device."""

    rows: int
    block_length: int
    decode_seconds: float
    """Of the products of a decode step of `rows` rows."""
    position_seconds: float
    """Of the products of one prefilled position, in a full step."""
    kv_seconds: float
    """Of reading the KV of one position."""

    @classmethod
    def measure(cls, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> "DeviceFloor":
        """Time products and a large copy on the device, which has to have room for the weights and 2 GiB."""
        positions = PREFILL_POSITIONS if device.type == "cuda" else rows
        return cls(
            rows=rows,
            block_length=config.block_length,
            decode_seconds=products_seconds(decode_products(config, rows), device, dtype),
            position_seconds=products_seconds(prefill_products(config, positions), device, dtype) / positions,
            kv_seconds=kv_position_bytes(config, dtype) / copy_bandwidth(device),
        )

    def step(self, context: float) -> float:
        """Seconds of one decode step of all rows, each at `context` positions."""
        return self.decode_seconds + self.rows * context * self.kv_seconds

    def tokens_per_second(self, workload: Workload) -> float:
        """Generated tokens a second with all rows decoding always, at the mean context of the workload.

        The positions of the prompts are products only: attention's arithmetic is not counted.
        """
        prompt, answer = (tokens / self.block_length for tokens in (workload.prompt_tokens, workload.answer_tokens))
        seconds = prompt * self.position_seconds + answer * self.step(prompt + answer / 2) / self.rows
        return workload.answer_tokens / seconds


def step_floor(config: ModelConfig, rows: int, context: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that one step of `rows` rows at `context` block decoder positions takes at the least."""
    kv_seconds = kv_position_bytes(config, dtype) * context * rows / copy_bandwidth(device)
    return products_seconds(decode_products(config, rows), device, dtype) + kv_seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a device-to-device copy much larger than the caches."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    return COPIES * 2 * size / _median_seconds(copies, device)


def kv_position_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one position, all layers."""
    return 2 * config.block_decoder.num_layers * config.block_decoder.hidden_size * dtype.itemsize


def decode_products(config: ModelConfig, rows: int) -> list[Product]:
    """Of a step that writes a block for each of `rows` rows."""
    return _positions_products(config, rows) + _writer_products(config, rows)


def prefill_products(config: ModelConfig, positions: int) -> list[Product]:
    """Of prefilling so many positions; the last layer ends with its keys and values."""
    return _positions_products(config, positions)[:-3]


def products_seconds(products: Iterable[Product], device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the products one after another, each with weights of its own."""
    inputs: dict[tuple[int, int], Tensor] = {}
    operands = []
    for rows, inner, columns in products:
        if (rows, inner) not in inputs:
            inputs[rows, inner] = torch.randn(rows, inner, device=device, dtype=dtype)
        operands.append((inputs[rows, inner], torch.randn(inner, columns, device=device, dtype=dtype)))

    def run() -> None:
        for left, right in operands:
            torch.mm(left, right)

    return _median_seconds(run if device.type == "cpu" else _captured(run), device)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """What replays `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _writer_products(config: ModelConfig, rows: int) -> list[Product]:
    """Of writing a block, or of a vanilla model a token, from the block decoder's output."""
    if not isinstance(config, BlockTransformerConfig):
        return [(rows, config.block_decoder.hidden_size, config.vocab_size)]
    token, hidden = config.token_decoder, config.token_decoder.hidden_size
    expansion = [(rows, config.block_decoder.hidden_size, config.expanded_vectors * hidden)]
    first = config.expanded_vectors if token.strategy == "prefix" else 1
    others = _decoder_products(token, rows, of_tokens=token.strategy == "prefix")
    passes = _decoder_products(token, first * rows) + others * (config.block_length - 1)
    return expansion + passes + [(rows, hidden, config.vocab_size)] * config.block_length


def _positions_products(config: ModelConfig, positions: int) -> list[Product]:
    """Of so many positions through the block decoder; those of a vanilla model are tokens."""
    return _decoder_products(config.block_decoder, positions, of_tokens=not isinstance(config, BlockTransformerConfig))


def _decoder_products(decoder: DecoderConfig, batch: int, *, of_tokens: bool = False) -> list[Product]:
    """Of one pass of `batch` positions through a decoder's layers.

    The first layer of tokens is a table by token, all but attention's own product.
    """
    hidden, ffn = decoder.hidden_size, decoder.intermediate_size
    layer = [(batch, hidden, 3 * hidden), (batch, hidden, hidden), (batch, hidden, ffn), (batch, ffn, hidden)]
    products = layer * decoder.num_layers
    return products[1:2] + products[4:] if of_tokens else products


def _median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(3):
        timed()
    return statistics.median(timed() for _ in range(repeats))
