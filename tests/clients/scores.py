"""lm-eval's figures against scores of our own: the same texts through the offline API."""

import math
from typing import Any

from engine.llm import LLM

TOLERANCE = 1e-4
"""Nats, of the sum over a continuation."""


def check_samples(figures: dict[str, Any]) -> str:
    """Raise AssertionError unless every loglikelihood of lm-eval's samples is that of `LLM.score`; says how close."""
    samples: dict[str, list[Any]] = figures["samples"]
    asked: list[tuple[str, str, float]] = []
    for kind in ("loglikelihood", "multiple_choice"):
        for arguments, responses in samples[kind]:
            for argument, response in zip(arguments.values(), responses, strict=True):
                asked.append((argument["arg_0"], argument["arg_1"], float(response[0][0])))
    llm = LLM(device="cpu", dtype="float32", max_rows=4)
    encode = llm.tokenizer.encode
    # As lm-eval splits them: a continuation is what the whole has behind the tokens of its context.
    wholes = [encode(context + continuation) for context, continuation, _ in asked]
    contexts = [len(encode(context)) for context, _, _ in asked]
    scores = llm.score(wholes, progress=False)
    worst = 0.0
    for (context, continuation, told), score, length in zip(asked, scores, contexts, strict=True):
        expected = math.fsum(score[length - 1 :])
        assert abs(told - expected) <= TOLERANCE, f"{context!r}{continuation!r}: {told}, our own {expected}"
        worst = max(worst, abs(told - expected))
    generated = [responses[0][0] for _, responses in samples["generate_until"]]
    assert not any(set(".!") & set(text) for text in generated), f"a text goes on behind its stop: {generated}"
    assert len(set(generated)) > 5, f"hardly any two texts differ: {generated}"
    return (
        f"{len(asked)} loglikelihoods within {worst:.1e} of our own, {len(generated)} texts that end before their stops"
    )
