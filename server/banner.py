"""What `blockserve serve` tells a person once it is ready."""

import json
import shlex

from engine.types import EngineInfo

FIRST_PROMPT = "Once upon a time"


def start_banner(info: EngineInfo, name: str, version: str, url: str) -> str:
    """Lines with model, device, capacity and address, and a first request to paste into a shell."""
    pages = f"{info.pages:,} pages of {info.page_size} positions"
    rows = (
        ("model", f"{name} ({_count(info.parameters)} parameters, {info.block_length} tokens a block)"),
        ("length", f"{info.max_length:,} tokens of prompt and answer"),
        ("device", f"{info.device}, {info.dtype}"),
        ("KV cache", f"{info.kv_capacity_tokens:,} tokens in {pages}, {info.kv_bytes / 2**20:,.0f} MiB"),
        ("rows", f"{info.max_rows:,} requests at once"),
        ("address", url),
    )
    lines = [f"blockserve {version} is ready", ""]
    lines += [f"  {label:<9} {value}" for label, value in rows]
    lines += ["", "A first request:", "", *("  " + line for line in first_request(url).splitlines()), ""]
    return "\n".join(lines)


def first_request(url: str) -> str:
    """A shell command that streams a completion."""
    body = json.dumps({"prompt": FIRST_PROMPT, "max_tokens": 100, "stream": True})
    return (
        f"curl -N {shlex.quote(url + '/v1/completions')} \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
