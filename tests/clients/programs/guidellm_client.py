"""guidellm: a closed loop of streams; its token counts, which come from usage, and the sizes that it asked for."""

import json
import subprocess
import sys
from pathlib import Path

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64, 32


def main() -> None:
    """The figures, as the last line."""
    url, model = sys.argv[1:3]
    report = Path.cwd() / "report.json"
    command = [
        str(Path(sys.executable).parent / "guidellm"), "run",
        "--backend", f"kind=openai_http,target={url},request_format=/v1/completions",
        "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={model}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output", f"kind=json,path={report}", "--disable-console-interactive",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    prompt, output = (metrics[f"{kind}_token_count"]["successful"] for kind in ("prompt", "output"))
    assert (prompt["min"], prompt["max"]) == (PROMPT_TOKENS, PROMPT_TOKENS)
    assert (output["min"], output["max"]) == (OUTPUT_TOKENS, OUTPUT_TOKENS)
    assert metrics["time_to_first_token_ms"]["successful"]["count"] == REQUESTS
    print(f"{REQUESTS} streams of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens, no error")
    figures = {
        "prompt_tokens": int(prompt["total_sum"]),
        "generation_tokens": int(output["total_sum"]),
        "completions": metrics["request_totals"]["successful"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
