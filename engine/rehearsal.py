"""Before the first request: how much memory steps take besides the KV cache, measured by running the largest."""

from collections.abc import Callable

import torch

from engine.config import ConfigError, EngineConfig
from engine.kv_cache import KVCache, KVLayout
from engine.out_of_memory import is_out_of_memory
from engine.prefill_graphs import largest_graph
from engine.runner import Runner


def activation_bytes(build: Callable[[KVCache], Runner], layout: KVLayout, config: EngineConfig) -> int:
    """Bytes that the device needs beside weights and pages: tables, scratch cache and what the largest steps compute.

    Runs a prefill of `max_step_positions` and a decode step of `max_rows` over a cache of the null page alone, and the
    prefill of the largest graph. Graphs keep their memory to themselves, and what one kind leaves may be in the wrong
    pieces for the other, so the peaks add up. 0 on the CPU, where nothing is measured. Raises ConfigError if the device
    has too little for them even without a cache.
    """
    device = torch.device(config.device)
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    sizes = [(config.max_step_positions, 0), (0, config.max_rows)]
    if config.cuda_graphs:
        sizes.append((largest_graph(config.max_step_positions), 0))
    peaks = []
    try:
        runner = build(KVCache.allocate(layout, 0, device))
        for positions, rows in sizes:
            torch.cuda.reset_peak_memory_stats(device)
            runner.rehearse(positions, rows)
            torch.cuda.synchronize(device)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"max_step_positions, max_rows: the device has not the memory for a step of {config.max_step_positions} "
            f"positions or {config.max_rows} rows, with no KV cache at all; lower them"
        ) from None
    del runner
    torch.cuda.empty_cache()
    return sum(peaks)
