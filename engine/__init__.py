"""The engine. `from engine import LLM, SamplingParams` is the offline API; torch is imported only when LLM is used."""

from typing import TYPE_CHECKING, Any

from engine.types import SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM, Completion

__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
