"""Where an answer ends: at max_tokens, at EOS, or at a stop token."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.types import FinishReason, SamplingParams


class Cut(NamedTuple):
    """What is left of newly written tokens. `finish_reason` is None where the answer goes on."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


def cut_answer(
    token_ids: Sequence[int], generated: int, params: SamplingParams, stop_token_ids: frozenset[int], eos_token_id: int
) -> Cut:
    """Cut newly written tokens where the answer ends; the ending token stays in.

    `token_ids` follow `generated` earlier ones of the same answer. Tokens that are among the first min_tokens end
    nothing. A stop token that is also the last of max_tokens is reported as a stop. `stop_token_ids` has to hold
    params.stop_token_ids.
    """
    kept = token_ids[: params.max_tokens - generated]
    for place in range(max(params.min_tokens - generated, 0), len(kept)):
        token = kept[place]
        if token == eos_token_id and not params.ignore_eos:
            return Cut(tuple(kept[: place + 1]), "stop")
        if token in stop_token_ids:
            return Cut(tuple(kept[: place + 1]), "stop", token)
    return Cut(tuple(kept), "length" if generated + len(kept) >= params.max_tokens else None)
