"""The floor of a decode step: its matrix products and one reading of its KV, one after the other, nothing else."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import BlockTransformerConfig, DecoderConfig, ModelConfig


def step_floor(config: ModelConfig, rows: int, context: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that one step of `rows` rows at `context` block decoder positions takes at the least.

    Products are timed on the device with random operands of the step's shapes; the KV bytes are divided by the
    bandwidth of a large copy timed beside them.
    """
    products = _decoder_products(config.block_decoder, rows) + _writer_products(config, rows)
    operands = [_operands(shape, device, dtype) for shape in products]

    def run() -> None:
        for left, right in operands:
            torch.mm(left, right)

    decoder = config.block_decoder
    kv_bytes = 2 * decoder.num_layers * decoder.hidden_size * context * rows * dtype.itemsize
    return _median_seconds(run, device) + kv_bytes / copy_bandwidth(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a device-to-device copy much larger than the caches."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def _decoder_products(decoder: DecoderConfig, batch: int) -> list[tuple[int, int, int]]:
    """(rows, in, out) of one pass of `batch` positions through a decoder's layers."""
    hidden, ffn = decoder.hidden_size, decoder.intermediate_size
    layer = [(batch, hidden, 3 * hidden), (batch, hidden, hidden), (batch, hidden, ffn), (batch, ffn, hidden)]
    return layer * decoder.num_layers


def _writer_products(config: ModelConfig, rows: int) -> list[tuple[int, int, int]]:
    if not isinstance(config, BlockTransformerConfig):
        return [(rows, config.block_decoder.hidden_size, config.vocab_size)]
    token, hidden = config.token_decoder, config.token_decoder.hidden_size
    expansion = [(rows, config.block_decoder.hidden_size, config.expanded_vectors * hidden)]
    first = config.expanded_vectors if token.strategy == "prefix" else 1
    passes = _decoder_products(token, first * rows) + _decoder_products(token, rows) * (config.block_length - 1)
    return expansion + passes + [(rows, hidden, config.vocab_size)] * config.block_length


def _operands(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    # Weights are stored [out, in]: the product reads them transposed, as the model does.
    return left, torch.randn(columns, inner, device=device, dtype=dtype).t()


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
