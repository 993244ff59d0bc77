import math

import pytest
import torch

from benchmarks.floor import DeviceFloor, decode_products, kv_position_bytes, prefill_products
from benchmarks.models import MODELS, WORKLOADS
from tests.benchmarks.tiny import MODEL, TINY

H200 = DeviceFloor(
    rows=1024,
    block_length=4,
    decode_seconds=(2.03 + 10.85) * 1e-3,
    position_seconds=0.94e-3 / 512,
    kv_seconds=4 * 24_576 / 4.28e12,
)
"""What was measured for block-1.2B on an H200."""


@pytest.mark.parametrize("workload", ["P", "D", "X"])
def test_parts_add_up_to_the_known_floors(workload: str) -> None:
    known = MODELS["block-1.2B"].floors[workload]
    assert H200.tokens_per_second(WORKLOADS[workload]) == pytest.approx(known, rel=0.02)


def test_products_are_those_of_the_parameters() -> None:
    config = MODELS["block-1.2B"].config
    decoder = 12 * 12 * 2048**2
    expansion, head = 2048 * 2 * 2048, 2048 * 50304
    weights = sum(inner * columns for _, inner, columns in decode_products(config, 1))
    # Of a token, the first layer is a table but for attention's own product.
    token = decoder - 11 * 2048**2
    # The pass of the two prefix positions and three more through the token decoder; a head for each token.
    assert weights == decoder + expansion + decoder + 3 * token + 4 * head
    macs = sum(math.prod(product) for product in decode_products(config, 8))
    assert macs == 8 * (decoder + expansion + 2 * decoder + 3 * token + 4 * head)
    # The last layer stops at its keys and values.
    assert sum(map(math.prod, prefill_products(config, 8))) == 8 * (decoder - 9 * 2048**2)


def test_a_vanilla_model_writes_with_its_head() -> None:
    weights = sum(inner * columns for _, inner, columns in decode_products(MODELS["vanilla-302M"].config, 1))
    # Its first layer is a table, too.
    assert weights == 24 * 12 * 1024**2 - 11 * 1024**2 + 1024 * 50304
    macs = sum(map(math.prod, prefill_products(MODELS["vanilla-302M"].config, 8)))
    assert macs == 8 * (24 * 12 - 11 - 9) * 1024**2


def test_a_position_holds_keys_and_values_of_all_layers() -> None:
    assert kv_position_bytes(MODELS["block-1.2B"].config, torch.bfloat16) == 4 * 24_576


def test_a_floor_is_measured_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.floor.copy_bandwidth", lambda device: 1e9)
    floor = DeviceFloor.measure(TINY, MODEL.rows, torch.device("cpu"), torch.float32)
    assert floor.kv_seconds == 2 * 32 * 4 / 1e9
    assert floor.decode_seconds > floor.position_seconds > 0
    assert floor.step(8) == pytest.approx(floor.decode_seconds + 4 * 8 * floor.kv_seconds)
