"""aiperf: a closed loop of streams; its token totals from usage and from the model directory's tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64, 32


def main() -> None:
    """The figures, as the last line."""
    url, model = sys.argv[1:3]
    out = Path.cwd() / "out"
    command = [
        str(Path(sys.executable).parent / "aiperf"), "profile", "--ui", "none",
        "--model", "blockserve-stories", "--url", url, "--endpoint-type", "completions", "--streaming",
        "--tokenizer", model, "--synthetic-input-tokens-mean", str(PROMPT_TOKENS),
        "--output-tokens-mean", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true",
        "--extra-inputs", "repetition_penalty:1.0", "--concurrency", "4", "--request-count", str(REQUESTS),
        "--use-server-token-count", "--artifact-dir", str(out),
    ]  # fmt: skip
    # With this it takes the model's directory for the name of a model on the hub.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads((out / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    figures = {
        "prompt_tokens": int(told["total_usage_prompt_tokens"]["avg"]),
        "generation_tokens": int(told["total_usage_completion_tokens"]["avg"]),
        "completions": int(told["request_count"]["avg"]),
    }
    assert told["request_error_rate"]["avg"] == 0 and told["error_summary"] == []
    assert figures["completions"] == REQUESTS
    assert figures["prompt_tokens"] == told["total_isl"]["avg"] == REQUESTS * PROMPT_TOKENS
    assert figures["generation_tokens"] == told["total_osl"]["avg"] == REQUESTS * OUTPUT_TOKENS
    print(f"{REQUESTS} streams of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens, no error")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
