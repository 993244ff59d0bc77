"""What `blockserve serve` tells a person once it is ready."""

import json
import shlex

from engine.types import EngineInfo
from server.settings import ENVIRONMENT_PREFIX

KEY_VARIABLE = ENVIRONMENT_PREFIX + "API_KEY"
FIRST_PROMPT = "Once upon a time"


def start_banner(
    info: EngineInfo, name: str, version: str, url: str, *, needs_key: bool = False, engines: int = 1
) -> str:
    """Lines with model, device, capacity and address, and a first request to paste into a shell."""
    pages = f"{info.pages:,} pages of {info.page_size} positions"
    writes = f"{info.block_length} tokens a block" if info.block_length > 1 else "token by token"
    rows = (
        ("model", f"{name} ({_count(info.parameters)} parameters, {writes})"),
        ("length", f"{info.max_length:,} tokens of prompt and answer"),
        ("device", f"{info.device}, {info.dtype}"),
        ("KV cache", f"{info.kv_capacity_tokens:,} tokens in {pages}, {info.kv_bytes / 2**20:,.0f} MiB"),
        ("rows", f"{info.max_rows:,} requests at once"),
        *([("engines", f"{engines}, each with device, cache and rows of its own")] if engines > 1 else []),
        ("address", url),
    )
    lines = [f"blockserve {version} is ready", ""]
    lines += [f"  {label:<9} {value}" for label, value in rows]
    command = first_request(url, needs_key=needs_key)
    lines += ["", "A first request:", "", *("  " + line for line in command.splitlines()), ""]
    return "\n".join(lines)


def first_request(url: str, *, needs_key: bool) -> str:
    """A shell command that streams a completion. A key it takes from the shell: the banner may end up in a log."""
    body = json.dumps({"prompt": FIRST_PROMPT, "max_tokens": 100, "stream": True})
    key = f'  -H "Authorization: Bearer ${KEY_VARIABLE}" \\\n' if needs_key else ""
    return (
        f"curl -N {shlex.quote(url + '/v1/completions')} \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"{key}"
        f"  -d {shlex.quote(body)}"
    )


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
