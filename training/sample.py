"""Samples of a model as it is served: by the engine and its sampler, uncurated, for the model card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from engine import LLM, SamplingParams


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: writes ``[{"seed", "prompt", "text"}]``; ``text`` is the continuation."""
    parser = argparse.ArgumentParser(description="Sample from an exported model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=400)
    given = parser.parse_args(argv)
    params = [
        SamplingParams(max_tokens=given.max_tokens, temperature=given.temperature, top_p=given.top_p, seed=seed)
        for seed in range(given.seeds)
    ]
    # Float32 on the CPU, so that the card's text is what anybody gets for these seeds.
    answers = LLM(str(given.model), device="cpu").generate([given.prompt] * given.seeds, params)
    samples = [{"seed": seed, "prompt": given.prompt, "text": answer.text} for seed, answer in enumerate(answers)]
    given.out.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
