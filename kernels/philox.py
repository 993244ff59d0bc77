"""Random numbers without state: Philox4x32-10 (Salmon et al., SC11) as a function of seed, place and token.

A request's noise depends on nothing but its seed, so its tokens do not depend on what else is in the batch.
"""

import torch
from torch import Tensor

from kernels.jit import jit, tl

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What the two halves of the key grow by from round to round."""
ROUNDS = 10
MASK32 = 0xFFFFFFFF


def philox4x32(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words of randomness for each 128-bit counter (c0, c1, c2, c3) and 64-bit key (k0, k1).

    A round, with hi and lo the halves of a 64-bit product:

        (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

    even: (c0, c2), odd: (c1, c3), key: (k0, k1), each int64 [2, ...] in [0, 2^32); they broadcast together. Returns
    the output's (c0, c2) and (c1, c3) likewise.
    """
    pair = (2, *[1] * (even.dim() - 1))
    multipliers = torch.tensor(MULTIPLIERS, device=even.device).view(pair)
    weyl = torch.tensor(WEYL, device=even.device).view(pair)
    for step in range(ROUNDS):
        # Products wrap modulo 2^64, which leaves all their bits right; odd words are masked only where they come to
        # matter.
        products = (even * multipliers).flip(0)
        even = ((products >> 32) ^ odd ^ (key + step * weyl)) & MASK32
        odd = products
    return even, odd & MASK32


def gumbel_noise(seeds: Tensor, generated_index: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of the vocabulary.

    The key is the seed's low and high 32 bits, the counter (token // 4, generated_index, 0, 0), and token % 4 chooses
    the word:

        u = ((word >> 9) + 0.5) * 2^-23;   noise = -log(-log(u))

    seeds: [R] int64, not negative. generated_index: [R] int32, the token's place in its answer. Returns [R, vocab_size]
    fp32.
    """
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device)
    place = generated_index.long()[:, None]
    even = torch.stack((groups, torch.zeros_like(groups)))[:, None]  # [2, 1, groups]
    odd = torch.stack((place, torch.zeros_like(place)))  # [2, R, 1]
    key = torch.stack((seeds & MASK32, seeds >> 32))[:, :, None]  # [2, R, 1]
    even, odd = philox4x32(even, odd, key)
    words = torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


@jit
def _gumbel(words: tl.tensor) -> tl.tensor:
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@jit
def gumbel_tile(seed: tl.tensor, place: tl.tensor, first: tl.tensor, TILE_V: tl.constexpr) -> tl.tensor:
    """`gumbel_noise` in Triton, for use in a kernel: noise [TILE_V] of the tokens from `first` on, a multiple of 4."""
    groups = first // 4 + tl.arange(0, TILE_V // 4)
    zero = groups * 0
    word0, word1, word2, word3 = tl.philox(seed, groups, zero + place, zero, zero)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return _gumbel(words)


@jit
def gumbel_at(seed: tl.tensor, place: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """`gumbel_noise` in Triton of any tokens, int32; four times the work of `gumbel_tile` for each."""
    groups, lane = tokens // 4, tokens % 4
    zero = groups * 0
    word0, word1, word2, word3 = tl.philox(seed, groups, zero + place, zero, zero)
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    return _gumbel(word)
