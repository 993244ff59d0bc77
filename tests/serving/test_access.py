"""A server with API keys, from outside: who gets in, and that no key gets out."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.serving.server_process import ServerProcess, start_server

MODEL = "blockserve-stories"
BY_FILE, BY_VARIABLE = "sk-from-the-file", "sk-from-the-variable"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("guarded")
    keys = directory / "keys"
    keys.write_text(f"# of the tests\n{BY_FILE}\n", encoding="utf-8")
    environment = {"BLOCKSERVE_API_KEY": BY_VARIABLE}
    with start_server(directory, "--api-key-file", str(keys), environment=environment) as running:
        yield running


@pytest.mark.parametrize("key", [BY_FILE, BY_VARIABLE])
def test_the_openai_client_gets_in_with_either_key(guarded: ServerProcess, key: str) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
    assert client.models.list().data[0].id == MODEL
    whole = client.completions.create(model=MODEL, prompt="Once", max_tokens=8, seed=3, echo=True)
    chunks = list(client.completions.create(model=MODEL, prompt="Once", max_tokens=8, seed=3, echo=True, stream=True))
    assert whole.choices[0].text.startswith("Once")
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_the_openai_client_is_told_that_its_key_is_wrong(guarded: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-guessed", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.completions.create(model=MODEL, prompt="Once")
    assert caught.value.code == "invalid_api_key"


def test_probes_are_open_and_metrics_are_not(guarded: ServerProcess) -> None:
    statuses = {path: httpx.get(guarded.url + path).status_code for path in ("/health", "/ready", "/metrics")}
    assert statuses == {"/health": 200, "/ready": 200, "/metrics": 401}


def test_a_remote_tokenizer_needs_nothing_else(guarded: ServerProcess) -> None:
    with httpx.Client(base_url=guarded.url, headers={"authorization": f"Bearer {BY_FILE}"}) as client:
        eos_token = client.get("/tokenizer_info").json()["eos_token"]
        tokens = client.post("/tokenize", json={"prompt": f"Once{eos_token}", "add_special_tokens": False}).json()
        assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": f"Once{eos_token}"}
        assert client.get("/load").json() == {"running": 0, "waiting": 0}


def test_no_key_is_in_the_output_or_on_a_command_line(guarded: ServerProcess) -> None:
    children = Path(f"/proc/{guarded.process.pid}/task/{guarded.process.pid}/children").read_text().split()
    assert len(children) >= 2
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    told = guarded.log.read_bytes() + b"".join(lines)
    assert b"api_keys=2" in told
    assert BY_FILE.encode() not in told
    assert BY_VARIABLE.encode() not in told
