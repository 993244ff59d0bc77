import pytest
import torch

from engine.config import (
    BlockTransformerConfig,
    ConfigError,
    DecoderConfig,
    EmbedderConfig,
    EngineConfig,
    TokenDecoderConfig,
)
from engine.kv_cache import KVCache, KVLayout, free_memory, plan_pages

BLOCK = DecoderConfig(num_layers=3, hidden_size=64, num_heads=4, intermediate_size=256)
MODEL = BlockTransformerConfig(
    vocab_size=512,
    block_length=4,
    max_length=500,
    embedder=EmbedderConfig(hidden_size=16),
    block_decoder=BLOCK,
    token_decoder=TokenDecoderConfig(num_layers=2, hidden_size=64, num_heads=4, intermediate_size=256, prefix_length=2),
)
LAYOUT = KVLayout.of(BLOCK, 16, torch.float32)
PAGES_PER_REQUEST = 8  # 500 tokens are 125 positions


def test_page_bytes_are_those_of_the_tensors() -> None:
    cache = KVCache.allocate(LAYOUT, 5, torch.device("cpu"))
    assert cache.pages == 5
    assert cache.keys.shape == cache.values.shape == (3, 6, 4, 16, 16)
    assert cache.keys.nbytes + cache.values.nbytes == 6 * LAYOUT.page_bytes


def test_bytes_given_are_taken() -> None:
    config = EngineConfig.create(kv_bytes=100 * LAYOUT.page_bytes + 1)
    assert plan_pages(LAYOUT, MODEL, config, free_bytes=0) == 99


def test_a_fraction_of_free_memory_is_taken_up_to_what_all_rows_can_use() -> None:
    free = 1000 * LAYOUT.page_bytes
    assert plan_pages(LAYOUT, MODEL, EngineConfig.create(memory_fraction=0.5, max_rows=500), free) == 499
    assert (
        plan_pages(LAYOUT, MODEL, EngineConfig.create(memory_fraction=0.5, max_rows=10), free) == 10 * PAGES_PER_REQUEST
    )


@pytest.mark.parametrize("pages", [1, PAGES_PER_REQUEST])
def test_too_little_for_one_request_is_an_error_with_the_numbers(pages: int) -> None:
    needed = (PAGES_PER_REQUEST + 1) * LAYOUT.page_bytes
    with pytest.raises(
        ConfigError, match=rf"kv_bytes.*500 tokens.*{needed} bytes.*kv_bytes {pages * LAYOUT.page_bytes}"
    ):
        plan_pages(LAYOUT, MODEL, EngineConfig.create(kv_bytes=pages * LAYOUT.page_bytes), 0)
    with pytest.raises(ConfigError, match=rf"memory_fraction 0.9 of {pages * LAYOUT.page_bytes} free bytes"):
        plan_pages(LAYOUT, MODEL, EngineConfig.create(), pages * LAYOUT.page_bytes)


def test_free_memory_of_the_host_is_plausible() -> None:
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50
