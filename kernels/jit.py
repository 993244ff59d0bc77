"""Triton as the kernels import it: also where it is not installed, as the torch twins do without it.

Kernels are compiled for the GPU, or run by Triton's interpreter on the CPU where the environment variable
TRITON_INTERPRET is 1 when Triton is imported: slow, but the same source.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None
    tl = SimpleNamespace(tensor=object, constexpr=lambda value: value)

__all__ = ["LOG2_E", "cdiv", "has_triton", "interpreted", "jit", "jit_for_any", "power_of_2", "tl"]

LOG2_E = 1.4426950408889634
"""The hardware has powers of 2 only: exp(x) = 2^(x LOG2_E)."""


def jit(kernel: Callable[..., Any]) -> Any:
    """Make a Triton kernel, or a function that kernels call, of a function in Triton's language."""
    return kernel if triton is None else triton.jit(kernel)


def jit_for_any(*names: str, addresses: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """As `jit`, compiled once for all values of the integers `names`, such as counts that differ from step to step.

    Triton compiles anew for a 1 and for multiples of 16, which takes a second in the middle of serving; of the tensors
    `addresses` too, if they begin at a multiple of 16 bytes once and not always.
    """

    def decorate(kernel: Callable[..., Any]) -> Any:
        if triton is None:
            return kernel
        return triton.jit(kernel, do_not_specialize=names, do_not_specialize_on_alignment=addresses)

    return decorate


def has_triton() -> bool:
    """Whether kernels can be launched at all."""
    return triton is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Its bf16 arithmetic is wrong: operands have to be cast before."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below a positive number: tiles have such sizes only."""
    return 1 << (number - 1).bit_length()
