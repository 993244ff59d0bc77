"""What scheduler tests share: sequences made from numbers, a scheduler made from numbers, a model that is a formula."""

import math
from collections.abc import Sequence as Seq

from engine.admission import AdmissionRule, may_admit
from engine.alignment import align_prompt
from engine.config import PromptAlignment
from engine.page_pool import PagePool
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step_budget import StepBudget
from engine.step_plan import StepPlan
from engine.types import Delta, GenerationRequest, SamplingParams

EOS = 0
PAD = 99
BLOCK_LENGTH = 4


def make_sequence(
    key: int,
    prompt: int | Seq[int] = 4,
    *,
    params: SamplingParams | None = None,
    max_tokens: int = 8,
    priority: int = 0,
    arrival: float = 0.0,
    alignment: PromptAlignment = "left_pad",
    cache_salt: str = "",
) -> Sequence:
    """A sequence of a prompt, or of one of `prompt` tokens 101, 102, ..."""
    token_ids = tuple(range(101, 101 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    request = GenerationRequest.of(
        request_id=key,
        prompt_token_ids=token_ids,
        params=params or SamplingParams(max_tokens=max_tokens, seed=0),
        priority=priority,
        cache_salt=cache_salt,
    )
    aligned = align_prompt(token_ids, BLOCK_LENGTH, alignment, PAD)
    return Sequence(key=key, request=request, prompt=aligned, arrival=arrival, block_length=BLOCK_LENGTH)


def tokens_of(sequence: Sequence) -> list[int]:
    """The tokens of its known blocks."""
    tokens: list[int] = sequence.blocks.ravel().tolist()
    return tokens


def make_scheduler(
    *,
    pages: int = 64,
    max_rows: int = 4,
    max_waiting: int = 16,
    page_size: int = 2,
    max_step_positions: int = 16,
    attention_positions: float = math.inf,
    admission: AdmissionRule = may_admit,
    prefix_cache: bool = False,
) -> Scheduler:
    """A scheduler with a pool of its own."""
    pool = PagePool(pages)
    return Scheduler(
        pool=pool,
        prefix_cache=PrefixCache(pool, page_size, enabled=prefix_cache),
        max_rows=max_rows,
        max_waiting=max_waiting,
        page_size=page_size,
        budget=StepBudget(max_step_positions, attention_positions),
        block_length=BLOCK_LENGTH,
        eos_token_id=EOS,
        admission=admission,
    )


def commit_blocks(
    scheduler: Scheduler, plan: StepPlan, blocks: Seq[Seq[int]] | None = None, now: float = 0.0
) -> list[Delta]:
    """Commit a step whose rows wrote `blocks` (default: tokens that end nothing), and check all invariants after it.

    What began or ended comes first.
    """
    if blocks is None:
        blocks = [[*sequence.forced, 50, 50, 50, 50][:BLOCK_LENGTH] for sequence in plan.decode]
    results = scheduler.commit(plan, blocks, [True] * len(blocks), now)
    scheduler.check_integrity()
    return [delta for _, delta in results]


def must_schedule(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    """The next step, where there has to be one; checks all invariants after it."""
    plan = scheduler.schedule(now)
    assert plan is not None
    scheduler.check_integrity()
    return plan
