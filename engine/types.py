"""The nouns of the engine: plain data that crosses module and process borders.

This module imports nothing of ours. Every struct is a frozen msgspec struct, so that the same
object is an argument in one process and a message between two.
"""

from array import array
from collections.abc import Iterable
from typing import Literal, Self

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
RejectCode = Literal["invalid", "queue_full", "unavailable"]

SEED_RANGE = 1 << 63
"""Seeds are integers in [0, SEED_RANGE): they are Philox keys and have to fit a signed 64-bit tensor."""


MAX_STOP_TOKEN_IDS = 64
"""Stop token ids a request may name: with EOS, the width of a table on the device."""

MAX_LOGIT_BIAS = 300
"""Tokens whose logits a request may shift: the width of a table on the device."""

MAX_LOGPROBS = 20
"""Likeliest tokens that a request may ask the logprobs of."""


class InvalidRequestError(ValueError):
    """A request that cannot be served as it stands. `param` names the field at fault."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.message = message


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as 32-bit integers of this machine. Raises TypeError or OverflowError for what is not one."""
    return array("i", token_ids).tobytes()


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """What `pack_tokens` packed. Raises ValueError where the length is not one of whole tokens."""
    token_ids = array("i")
    token_ids.frombytes(packed)
    return tuple(token_ids)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one answer are chosen, and where it ends.

    temperature 0 is greedy (lowest id among equals). top_k 0, top_p 1 and min_p 0 are off. `seed` None means that
    whoever submits the request draws one. `stop` strings are matched on text, so they are the business of
    `engine.text_stream`, not of the scheduler; everything else here is enforced by the engine.

    Logits are changed in this order, for greedy answers too: bias, penalties, temperature, thresholds. presence_penalty
    and frequency_penalty look at the answer so far, repetition_penalty at the prompt too; 0, 0 and 1 are off.
    `logprobs` is how many of the likeliest tokens are told with each token's own logprob; None tells nothing. They are
    the model's: of the logits before any of this.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
    logprobs: int | None = None

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before the temperature: by bias or penalties."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return bool(self.logit_bias) or penalties != (0, 0, 1)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to generate: what occupies one row of the batch while it runs.

    `request_id` is chosen by the submitter and unique among its open requests; it is never a client's own id.
    """

    request_id: int
    prompt: bytes
    """Token ids, packed by `pack_tokens`: an engine takes thousands of long prompts at a time."""
    params: SamplingParams
    priority: int = 0
    """Smaller runs first; equal priorities run in order of arrival."""
    cache_salt: str = ""
    """Shares the pages of a prompt prefix with requests of the same salt only."""

    @classmethod
    def of(
        cls,
        *,
        request_id: int,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Self:
        """A request with the token ids of its prompt. Raises as `pack_tokens`."""
        return cls(
            request_id=request_id,
            prompt=pack_tokens(prompt_token_ids),
            params=params,
            priority=priority,
            cache_salt=cache_salt,
        )

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt, unpacked."""
        return unpack_tokens(self.prompt)


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A text whose tokens' logprobs are asked for: of all but the first, or the first block's (`padding`).

    The answer is one delta without tokens, whose `logprobs` are those, or an error. `request_id` is as a
    GenerationRequest's, and other than any of those.
    """

    request_id: int
    text: bytes
    """Token ids, packed by `pack_tokens`."""
    top: int = 0
    """How many of the likeliest tokens are told with each, 0 to MAX_LOGPROBS."""
    padding: int | None = None
    """Pads in front, fewer than a block. None: what predicts every token but the first. The first block's never are."""


class Timing(msgspec.Struct, frozen=True):
    """Where the time before a request's first tokens went, in seconds."""

    queue: float
    """From arrival at the engine to the first step that worked on it."""
    prefill: float
    """From that step's start to the first tokens."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's logprob, and the likeliest tokens in its place, the best first and equals in order of ids."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What one step added to one request.

    `token_ids` ends with the EOS or stop token where one ended the answer. `timing` comes with the first tokens only.
    `stop_reason` is the stop token's id (None for EOS). `error` is set exactly where finish_reason is "error".
    `cached_tokens` of the prompt were found in the prefix cache, which the first tokens tell too.
    """

    request_id: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    timing: Timing | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids` where the request asked for them; or those of a ScoreRequest."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of how busy an engine is."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves and how much of it fits: everything a front end may need to know of it."""

    model: str
    """What clients call it."""
    vocab_size: int
    block_length: int
    max_length: int
    """Tokens: prompt and answer together."""
    eos_token_id: int
    device: str
    dtype: str
    max_rows: int
    pages: int
    page_size: int
    """Positions a page holds."""
    kv_bytes: int
    parameters: int

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens whose KV fits at once."""
        return self.pages * self.page_size * self.block_length
