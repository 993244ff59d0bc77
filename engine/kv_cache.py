"""The paged KV cache of the block decoder: how a page is laid out, how many fit, and the tensors themselves."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ConfigError, DecoderConfig, EngineConfig, ModelConfig

NULL_PAGE = 0
"""Padding rows and dead rows write here; no request ever owns it."""


@dataclass(frozen=True)
class KVLayout:
    """What one page holds: keys and values of `page_size` positions, all layers and heads."""

    num_layers: int
    num_heads: int
    head_size: int
    page_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, decoder: DecoderConfig, page_size: int, dtype: torch.dtype) -> "KVLayout":
        """The layout for a decoder's KV."""
        return cls(decoder.num_layers, decoder.num_heads, decoder.head_size, page_size, dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values of all layers."""
        return 2 * self.num_layers * self.num_heads * self.page_size * self.head_size * self.dtype.itemsize


@dataclass(frozen=True)
class KVCache:
    """Keys and values, each [layers, pages + 1, heads, page_size, head_size]; page 0 is the null page."""

    layout: KVLayout
    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, layout: KVLayout, pages: int, device: torch.device) -> "KVCache":
        """Memory for `pages` pages and the null page.

        They start at zero: a masked position is multiplied by a weight of zero, which only erases finite values.
        """
        shape = (layout.num_layers, pages + 1, layout.num_heads, layout.page_size, layout.head_size)
        keys = torch.zeros(shape, dtype=layout.dtype, device=device)
        values = torch.zeros(shape, dtype=layout.dtype, device=device)
        return cls(layout, keys, values)

    @property
    def pages(self) -> int:
        """Pages that requests can own."""
        return self.keys.shape[1] - 1


def plan_pages(
    layout: KVLayout, model: ModelConfig, config: EngineConfig, free_bytes: int, activation_bytes: int = 0
) -> int:
    """How many pages to allocate, the null page not counted.

    `kv_bytes` is taken as it is; otherwise what `activation_bytes` leave of `memory_fraction` of `free_bytes`, but no
    more than all rows can use.
    Raises ConfigError where one request of the model's maximum length would not fit.
    """
    pages_per_row = -(-model.max_positions // layout.page_size)
    if config.kv_bytes is not None:
        pages = config.kv_bytes // layout.page_bytes - 1
    else:
        affordable = (int(free_bytes * config.memory_fraction) - activation_bytes) // layout.page_bytes - 1
        pages = min(affordable, config.max_rows * pages_per_row)
    if pages < pages_per_row:
        needed = (pages_per_row + 1) * layout.page_bytes
        given = (
            f"kv_bytes {config.kv_bytes}"
            if config.kv_bytes is not None
            else f"memory_fraction {config.memory_fraction} of {free_bytes} free bytes, less {activation_bytes}"
        )
        raise ConfigError(
            f"kv_bytes: one request of the model's maximum length ({model.max_length} tokens) needs {needed} bytes of "
            f"KV cache, but {given} is not enough; raise it, or serve on a device with more memory"
        )
    return pages


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return free
    return _free_host_memory()


def _free_host_memory() -> int:
    available = _meminfo_available()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ConfigError("kv_bytes: this system does not tell how much memory is free (/proc/meminfo); set kv_bytes")
