"""Philox against the published test vectors, and the noise made of it."""

import math

import pytest
import torch
from torch.testing import assert_close

from kernels.jit import jit, tl
from kernels.philox import gumbel_noise, gumbel_tile, philox4x32

KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
"""Counter, key and output of Philox4x32-10 as the Random123 library publishes them."""


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The same in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high, low = divmod(0xCD9E8D57 * c2, 1 << 32)
        high2, low2 = divmod(0xD2511F53 * c0, 1 << 32)
        c0, c1, c2, c3 = high ^ c1 ^ k0, low, high2 ^ c3 ^ k1, low2
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    even, odd = philox4x32(torch.tensor(counter[::2]), torch.tensor(counter[1::2]), torch.tensor(key))
    assert [*even.tolist(), *odd.tolist()] == expected[::2] + expected[1::2]
    assert scalar_philox(counter, key) == expected


@pytest.mark.parametrize("vocab_size", [1, 4, 6, 513])
def test_noise_is_the_documented_function(vocab_size: int) -> None:
    seeds = [0, 1, (1 << 63) - 1, 0x0123456789ABCDEF]
    places = [0, 7, (1 << 31) - 1, 12345]
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor(places, dtype=torch.int32), vocab_size)
    assert noise.shape == (4, vocab_size)
    assert noise.dtype == torch.float32
    for row, (seed, place) in enumerate(zip(seeds, places, strict=True)):
        for token in {0, vocab_size // 2, vocab_size - 1}:
            words = scalar_philox([token // 4, place, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
            uniform = ((words[token % 4] >> 9) + 0.5) * 2.0**-23
            assert float(noise[row, token]) == pytest.approx(-math.log(-math.log(uniform)), rel=1e-5, abs=1e-6)


def test_noise_is_finite_at_both_ends() -> None:
    for word in (0, (1 << 23) - 1):
        uniform = torch.tensor(float(word)).add(0.5).mul(2.0**-23)
        assert 0 < uniform < 1
        assert uniform.log().neg().log().neg().isfinite()


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(torch.arange(8), torch.full((8,), 3, dtype=torch.int32), 25_000).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert float((noise < 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.005)


def test_rows_do_not_depend_on_each_other() -> None:
    seeds, places = torch.tensor([5, 6, 5]), torch.tensor([0, 0, 1], dtype=torch.int32)
    noise = gumbel_noise(seeds, places, 100)
    for row in range(3):
        assert torch.equal(noise[row : row + 1], gumbel_noise(seeds[row : row + 1], places[row : row + 1], 100))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


@jit
def store_noise(seeds: tl.tensor, places: tl.tensor, out: tl.tensor, TILE_V: tl.constexpr) -> None:
    row, tile = tl.program_id(0), tl.program_id(1)
    noise = gumbel_tile(tl.load(seeds + row), tl.load(places + row), tile * TILE_V, TILE_V)
    tl.store(out + (row * tl.num_programs(1) + tile) * TILE_V + tl.arange(0, TILE_V), noise)


def test_triton_makes_the_same_noise() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seeds = torch.tensor([0, 1, (1 << 63) - 1, 0x0123456789ABCDEF], device=device)
    places = torch.tensor([0, 7, (1 << 31) - 1, 12345], dtype=torch.int32, device=device)
    noise = torch.empty(4, 50 * 1024, device=device)
    store_noise[(4, 50)](seeds, places, noise, TILE_V=1024)
    assert_close(noise, gumbel_noise(seeds, places, 50 * 1024), atol=2e-6, rtol=2e-6)
