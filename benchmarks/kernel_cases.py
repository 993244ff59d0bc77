"""What `benchmarks.kernels` times: each operation at the shapes of the served models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.types import MAX_STOP_TOKEN_IDS
from kernels.adjust import AdjustmentTables
from kernels.dispatch import Kernels
from kernels.late_norm import LateNorm
from kernels.rotary import rotary_table
from kernels.sampler import SamplingTables

PAGE_SIZE = 16
VOCAB_SIZE = 50304
DTYPE = torch.bfloat16
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: what to run, and the fewest bytes or operations that it takes."""

    op: str
    shape: str
    run: Callable[[], object]
    bytes: float = 0.0
    flops: float = 0.0


def cases(kernels: Kernels, only: str) -> Iterator[Case]:
    """The cases of operations whose name contains `only`, made one after another."""
    for make in (
        _decode_cases,
        _prefill_cases,
        _local_cases,
        _rotary_cases,
        _row_cases,
        _product_cases,
        _late_product_cases,
        _sampler_cases,
        _adjusted_cases,
    ):
        yield from make(kernels, only)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=CUDA)


def _layer_buffers(positions: int, width: int) -> tuple[Tensor, Tensor]:
    """What a layer of such a width multiplies into and out of: [qkv | up] and [attention | gelu(up)]."""
    return _random(positions, 7 * width), _random(positions, 5 * width)


def _int32(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=CUDA)


def _pages(contexts: list[int], heads: int, head_size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Caches and a page table, `width` pages a row, whose pages lie in random order."""
    needed = [-(-context // PAGE_SIZE) for context in contexts]
    order = 1 + torch.randperm(sum(needed))
    table = torch.zeros(len(contexts), width, dtype=torch.int32)
    for row, (pages, part) in enumerate(zip(needed, order.split(needed), strict=True)):
        table[row, :pages] = part
    shape = (sum(needed) + 1, heads, PAGE_SIZE, head_size)
    return _random(*shape), _random(*shape), table.to(CUDA)


def _decode_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    op = "paged_decode_attention"
    ragged = [256 + 577 * row % 321 for row in range(1024)]
    for name, contexts, heads, head_size, width in (
        ("1024 rows, context 288, 16 heads of 128", [288] * 1024, 16, 128, 36),
        ("1024 rows, context 256..576, 16 heads of 128", ragged, 16, 128, 36),
        ("1024 rows, context 288, 16 heads of 128, room for 8192", [288] * 1024, 16, 128, 512),
        ("300 rows, context 2304, 16 heads of 128", [2304] * 300, 16, 128, 144),
        ("2048 rows, context 288, 16 heads of 64", [288] * 2048, 16, 64, 36),
        ("4096 rows, context 288, 12 heads of 64", [288] * 4096, 12, 64, 36),
        ("1 row, context 544, 16 heads of 128", [544], 16, 128, 36),
    ):
        if only not in op:
            continue
        keys, values, table = _pages(contexts, heads, head_size, width)
        rows = len(contexts)
        query = _random(rows, heads, head_size)
        out = torch.empty_like(query)
        arguments = query, keys, values, table, _int32(range(rows)), _int32(contexts), head_size**-0.5, out
        numbers = heads * head_size * 2 * (sum(contexts) + rows)
        yield Case(op, name, partial(kernels.paged_decode_attention, *arguments), bytes=numbers * DTYPE.itemsize)


def _prefill_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    op = "paged_prefill_attention"
    for name, starts, length, heads, head_size in (
        ("32 prompts of 512, 16 heads of 128", [0] * 32, 512, 16, 128),
        ("8 prompts of 2048, 16 heads of 128", [0] * 8, 2048, 16, 128),
        ("32 prompts of 512, 16 heads of 64", [0] * 32, 512, 16, 64),
        ("512 prompts of 32, 16 heads of 128", [0] * 512, 32, 16, 128),
        ("4 chunks of 512 behind 1536, 16 heads of 128", [1536] * 4, 512, 16, 128),
    ):
        if only not in op:
            continue
        chunks = len(starts)
        keys, values, table = _pages(
            [start + length for start in starts], heads, head_size, -(-(starts[0] + length) // PAGE_SIZE)
        )
        query = _random(chunks * length, heads, head_size)
        offsets = _int32(range(0, chunks * length + 1, length))
        chunk_rows, out = _int32(range(chunks)), torch.empty_like(query)
        arguments = query, keys, values, table, chunk_rows, offsets, _int32(starts), head_size**-0.5, out
        pairs = sum(length * start + length * (length + 1) / 2 for start in starts)
        yield Case(op, name, partial(kernels.paged_prefill_attention, *arguments), flops=4 * pairs * heads * head_size)


def _local_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    op = "local_attention_and_gelu"
    for rows, heads, head_size, length, first, late in (
        (1024, 16, 128, 2, 0, False),
        (1024, 16, 128, 1, 2, False),
        (1024, 16, 128, 1, 4, False),
        (2048, 16, 64, 1, 4, False),
        (4096, 12, 64, 1, 4, False),
        (1, 16, 128, 2, 0, False),
        (1, 16, 128, 2, 0, True),
        (1, 16, 128, 1, 4, False),
        (1, 16, 128, 1, 4, True),
        (16, 16, 128, 1, 4, False),
        (16, 16, 128, 1, 4, True),
    ):
        if only not in op:
            continue
        keys, values = (_random(rows, heads, 5, head_size) for _ in range(2))
        width = heads * head_size
        into, inner = _layer_buffers(rows * length, width)
        table = rotary_table(5, head_size // 4, 10000.0, CUDA)
        into, inner = into.view(rows, length, -1), inner.view(rows, length, -1)
        norm = _late_norm(rows * length, width) if late else None
        arguments = into, norm, first, table, keys, values, head_size**-0.5, inner
        yield Case(
            op,
            f"{rows} rows, {length} behind {first}, {heads} heads of {head_size}{', late norm' if late else ''}",
            partial(kernels.local_attention_and_gelu, *arguments),
            bytes=rows * width * (14 * length + 2 * first) * DTYPE.itemsize,
        )


def _late_norm(positions: int, width: int) -> LateNorm:
    return LateNorm(
        _random(positions, width), _random(width).float(), _random(7 * width).float(), _random(7 * width), eps=1e-5
    )


def _rotary_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    for rows, heads, head_size in ((1024, 16, 128), (16384, 16, 128), (2048, 16, 64)):
        if only not in "rotary_paged_write":
            continue
        width = heads * head_size
        qkv = _layer_buffers(rows, width)[0][:, : 3 * width]
        table = rotary_table(1024, head_size // 4, 1e4, CUDA)
        keys, values, _ = _pages([PAGE_SIZE] * rows, heads, head_size, 1)
        slots = (1 + torch.randperm(rows, device=CUDA)) * PAGE_SIZE + 5
        arguments = qkv, torch.randint(1024, (rows,), device=CUDA).int(), slots, table, keys, values
        yield Case(
            "rotary_paged_write",
            f"{rows} positions, {heads} heads of {head_size}",
            partial(kernels.rotary_paged_write, *arguments),
            bytes=2 * qkv.numel() * DTYPE.itemsize,
        )


def _row_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    """Kernels that work on whole rows of the residual stream."""
    if only not in "residual_normalise gelu_into block_embedding":
        return
    for rows, width in ((1024, 2048), (2048, 2048), (2048, 1024), (4096, 768), (16384, 2048)):
        x, branch = _random(rows, width), _random(rows, width)
        yield Case(
            "residual_normalise",
            f"{rows} x {width}",
            partial(kernels.residual_normalise, x, branch, 1e-5),
            bytes=4 * x.nbytes,
        )
        into, inner = _layer_buffers(rows, width)
        yield Case(
            "gelu_into",
            f"{rows} x {4 * width}",
            partial(kernels.gelu_into, into[:, 3 * width :], inner[:, width:]),
            bytes=2 * rows * 4 * width * DTYPE.itemsize,
        )
    for blocks, width in ((1024, 512), (16384, 512)):
        table = _random(VOCAB_SIZE, width)
        ids = torch.randint(VOCAB_SIZE, (blocks, 4), device=CUDA).int()
        yield Case(
            "block_embedding",
            f"{blocks} blocks of 4 x {width}",
            partial(kernels.block_embedding, ids, table),
            bytes=2 * blocks * 4 * width * DTYPE.itemsize,
        )


def _product_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    """The two products of a layer beside the four that they are made of; of one request, the head, too."""
    if only not in "linear":
        return
    few = ((rows, 2048) for rows in (1, 2, 4, 16))
    for rows, width in (*few, (1024, 2048), (2048, 1024), (4096, 768), (16384, 2048)):
        merged = (width, 7 * width), (5 * width, width)
        parts = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
        head = ((width, VOCAB_SIZE),) if rows <= 16 else ()
        for inner, columns in (*merged, *parts, *head):
            x, weight, bias = _random(rows, inner), _random(inner, columns), _random(columns)
            # The products of few rows read their weights and do little else.
            least = {"bytes": float(weight.nbytes)} if rows <= 16 else {"flops": 2.0 * rows * inner * columns}
            yield Case("linear", f"{rows} x {inner} -> {columns}", partial(kernels.linear, x, weight, bias), **least)


def _late_product_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    """The two products of a layer of few positions, whose norm comes behind the first."""
    if only not in "linear add_linear":
        return
    for rows, width in ((1, 2048), (2, 2048), (4, 2048), (16, 2048)):
        x, inner = _random(rows, width), _random(rows, 5 * width)
        into, out_of = _random(width, 7 * width), _random(5 * width, width)
        shapes = f"{rows} x {width} -> {7 * width}, no bias", f"{rows} x {5 * width} -> {width}"
        yield Case("linear", shapes[0], partial(kernels.linear, x, into, None), bytes=into.nbytes)
        yield Case("add_linear", shapes[1], partial(kernels.add_linear, x, inner, out_of), bytes=out_of.nbytes)


def _sampler_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    if only not in "sample":
        return
    for rows in (1024, 1):
        logits = _random(rows, VOCAB_SIZE) * 3
        greedy = SamplingTables(
            temperature=torch.zeros(rows, device=CUDA),
            top_k=_int32([0] * rows),
            top_p=torch.ones(rows, device=CUDA),
            min_p=torch.zeros(rows, device=CUDA),
            seed=torch.arange(rows, device=CUDA),
            suppress_until=_int32([0] * rows),
            suppressed_ids=_int32([[0] + [-1] * MAX_STOP_TOKEN_IDS] * rows),
        )
        waiting = _int32([1 << 20] * rows)
        warm = replace(greedy, temperature=torch.ones(rows, device=CUDA))
        for name, tables in (
            ("greedy", greedy),
            ("greedy, EOS suppressed", replace(greedy, suppress_until=waiting)),
            ("temperature 1", warm),
            ("temperature 1, EOS suppressed", replace(warm, suppress_until=waiting)),
            ("top-p 0.9", replace(warm, top_p=torch.full((rows,), 0.9, device=CUDA))),
            ("top-k 50", replace(warm, top_k=_int32([50] * rows))),
            ("temperature 0.8, top-k 50, top-p 0.9", _usual(greedy)),
            ("min-p 0.05", replace(warm, min_p=torch.full((rows,), 0.05, device=CUDA))),
        ):
            yield Case(
                "sample",
                f"{rows} rows of {VOCAB_SIZE}, {name}",
                partial(kernels.sample, logits, _int32(range(rows)), _int32([7] * rows), tables),
                bytes=logits.nbytes,
            )


def _adjusted_cases(kernels: Kernels, only: str) -> Iterator[Case]:
    """What only steps with penalties, bias or logprobs run: every row asks for all of it, or one does."""
    for rows, asking in ((1024, 1024), (1024, 1), (1, 1)):
        logits = _random(rows, VOCAB_SIZE) * 3
        asks = torch.arange(rows, device=CUDA) < asking
        shape = f"{asking} of {rows} rows of {VOCAB_SIZE}"
        if only in "adjust":
            yield Case(
                "adjust",
                shape,
                partial(kernels.adjust, logits, _int32(range(rows)), _int32([[5, 6, 7]] * rows), _all_adjusted(asks)),
                bytes=logits.nbytes + 4 * logits.numel() + 4 * asking * VOCAB_SIZE,
            )
        if only in "top_logprobs":
            for top in (0, 5, 20):
                wanted = torch.where(asks, top, -1).int()
                yield Case(
                    "top_logprobs",
                    f"{shape}, {top} likeliest",
                    partial(kernels.top_logprobs, logits, _int32([9] * rows), wanted),
                    bytes=logits.nbytes * asking / rows,
                )


def _all_adjusted(asks: Tensor) -> AdjustmentTables:
    """Penalties and 300 biases for the rows that ask."""
    slots = int(asks.sum()) + 1
    return AdjustmentTables(
        slot=torch.where(asks, torch.arange(len(asks), device=CUDA) + 1, 0).int(),
        repetition=torch.full((slots,), 1.1, device=CUDA),
        presence=torch.full((slots,), 0.5, device=CUDA),
        frequency=torch.full((slots,), 0.2, device=CUDA),
        counts=torch.randint(0, 2, (slots, VOCAB_SIZE), dtype=torch.int32, device=CUDA),
        bias_ids=torch.arange(300, dtype=torch.int32, device=CUDA).repeat(slots, 1),
        bias_values=torch.ones(slots, 300, device=CUDA),
        bias_length=_int32([300] * slots),
    )


def _usual(greedy: SamplingTables) -> SamplingTables:
    rows = len(greedy.seed)
    return replace(
        greedy,
        temperature=torch.full((rows,), 0.8, device=CUDA),
        top_k=_int32([50] * rows),
        top_p=torch.full((rows,), 0.9, device=CUDA),
    )
