"""Which implementation of each operation is used: decided here and nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.adjust import AdjustmentTables, adjust, triton_adjust
from kernels.block_embedding import block_embedding, triton_block_embedding
from kernels.decode_attention import paged_decode_attention, triton_paged_decode_attention
from kernels.gelu import gelu_into, triton_gelu_into
from kernels.jit import has_triton
from kernels.late_norm import LateNorm
from kernels.layer_norm import (
    residual_layer_norm,
    residual_normalise,
    triton_residual_layer_norm,
    triton_residual_normalise,
)
from kernels.linear import add_linear, linear
from kernels.local_attention import local_attention_and_gelu, triton_local_attention_and_gelu
from kernels.logprobs import Logprobs, top_logprobs, triton_top_logprobs
from kernels.prefill_attention import paged_prefill_attention, triton_paged_prefill_attention
from kernels.rotary import rotary_paged_write, triton_rotary_paged_write
from kernels.sampler import SamplingTables, sample, triton_sample

OptionalTensor = Tensor | None
OptionalLateNorm = LateNorm | None
Implementation = Literal["torch", "triton"]
LATE_NORM_POSITIONS = 16
"""Up to so many positions, reading a row of the residual stream in every program costs less than a launch."""


@dataclass(frozen=True)
class Kernels:
    """One implementation of each operation; shapes and formulas are documented in the operation's own file."""

    block_embedding: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, OptionalTensor], Tensor]
    add_linear: Callable[[Tensor, Tensor, Tensor], None]
    gelu_into: Callable[[Tensor, Tensor], None]
    residual_normalise: Callable[[Tensor, OptionalTensor, float], tuple[Tensor, Tensor]]
    residual_layer_norm: Callable[[Tensor, OptionalTensor, Tensor, Tensor, float], Tensor]
    rotary_paged_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    paged_decode_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], None]
    paged_prefill_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], None]
    local_attention_and_gelu: Callable[[Tensor, OptionalLateNorm, int, Tensor, Tensor, Tensor, float, Tensor], None]
    sample: Callable[[Tensor, Tensor, Tensor, SamplingTables], tuple[Tensor, Tensor]]
    adjust: Callable[[Tensor, Tensor, Tensor, AdjustmentTables], Tensor]
    top_logprobs: Callable[[Tensor, Tensor, Tensor], Logprobs]
    late_norm_positions: int
    """Of so many positions at most, a norm behind its product (`kernels.late_norm`) is faster than one in front."""


def torch_kernels() -> Kernels:
    """The torch twins: any device, every dtype."""
    return Kernels(
        block_embedding=block_embedding,
        linear=linear,
        add_linear=add_linear,
        gelu_into=gelu_into,
        residual_normalise=residual_normalise,
        residual_layer_norm=residual_layer_norm,
        rotary_paged_write=rotary_paged_write,
        paged_decode_attention=paged_decode_attention,
        paged_prefill_attention=paged_prefill_attention,
        local_attention_and_gelu=local_attention_and_gelu,
        sample=sample,
        adjust=adjust,
        top_logprobs=top_logprobs,
        late_norm_positions=0,
    )


def triton_kernels() -> Kernels:
    """The Triton kernels, for CUDA devices (and the CPU under Triton's interpreter). Products are cuBLAS's.

    Raises RuntimeError where Triton is not installed.
    """
    if not has_triton():
        raise RuntimeError("the kernels for CUDA need Triton, which is not installed: pip install triton")
    return Kernels(
        block_embedding=triton_block_embedding,
        linear=linear,
        add_linear=add_linear,
        gelu_into=triton_gelu_into,
        residual_normalise=triton_residual_normalise,
        residual_layer_norm=triton_residual_layer_norm,
        rotary_paged_write=triton_rotary_paged_write,
        paged_decode_attention=triton_paged_decode_attention,
        paged_prefill_attention=triton_paged_prefill_attention,
        local_attention_and_gelu=triton_local_attention_and_gelu,
        sample=triton_sample,
        adjust=triton_adjust,
        top_logprobs=triton_top_logprobs,
        late_norm_positions=LATE_NORM_POSITIONS,
    )


def select_kernels(device: torch.device, implementation: Implementation | None = None) -> Kernels:
    """The implementations for a device: Triton's on CUDA, the twins on the CPU; or those asked for, as tests do.

    Raises ValueError for a device that no operation is written for.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"there are no kernels for device {device}")
    if implementation is None:
        implementation = "triton" if device.type == "cuda" else "torch"
    return triton_kernels() if implementation == "triton" else torch_kernels()
