"""Padding changes nothing."""

import random

import pytest
import torch

from engine.config import ModelConfig
from engine.kv_cache import NULL_PAGE
from kernels.dispatch import select_kernels
from tests.engine.model.test_model import CONFIGS, VANILLA, name_of
from tests.engine.prefills import ROUNDING, Prefills, random_passes


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], VANILLA], ids=name_of)
def test_padding_changes_no_key_and_no_value(config: ModelConfig) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        plain, padded = (Prefills(config) for _ in range(2))
        for chunks in random_passes(seed):
            plain.run(chunks)
            padded.run(chunks, padding=rng.choice([1, 5, 128]), columns=rng.choice([1, 4, 32]))
        assert plain.cache.keys[:, NULL_PAGE].isnan().all(), "without padding nothing goes to the null page"
        assert padded.cache.keys[:, NULL_PAGE].isnan().logical_not().any()
        plain.check()
        padded.check(ROUNDING)


# What attention leaves of padding is whatever lay in memory, which numpy warns of in the interpreter.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_padding_changes_nothing_in_the_kernels() -> None:
    """In Triton's: on a GPU where there is one, otherwise interpreted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prefills = Prefills(CONFIGS[0], device, select_kernels(device, "triton"))
    prefills.run([(3, 0, 9), (1, 0, 1)], padding=3, columns=2)
    prefills.run([(0, 0, 2), (3, 9, 1), (1, 1, 4)], padding=33, columns=5)
    prefills.check(ROUNDING)


def test_nothing_but_padding_changes_nothing_but_the_null_page() -> None:
    config = CONFIGS[0]
    prefills = Prefills(config)
    prefills.run([(2, 0, 9)])
    # More of it than any row has positions.
    prefills.run([], padding=3 * config.max_positions)
    prefills.check()
