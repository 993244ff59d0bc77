"""A vanilla GPT-NeoX model, in a directory as Hugging Face's library writes it, behind the same front end."""

import shutil
from pathlib import Path

import openai

from engine.config import ModelConfig
from engine.model.naive import naive_model
from engine.types import SamplingParams
from tests.engine.helpers import golden_tensors
from tests.engine.tokenizers_of_tests import byte_level, save
from tests.golden.cases import DIRECTORY, VANILLA
from tests.serving.server_process import start_server

PROMPT = "Once upon a time"


def test_a_directory_of_hugging_faces_is_served_as_it_is(tmp_path: Path) -> None:
    model = tmp_path / "pythia-tiny"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DIRECTORY / VANILLA / name, model)
    tokenizer = byte_level()
    save(tokenizer, model)
    oracle = naive_model(ModelConfig.load(model), golden_tensors(VANILLA))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    expected = oracle.generate(tokenizer.encode(PROMPT).ids, params).token_ids

    with start_server(tmp_path, "--model", str(model), "--max-rows", "4") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert client.models.list().data[0].id == "pythia-tiny"
        extra = {"ignore_eos": True, "return_token_ids": True}
        whole = client.completions.create(
            model="pythia-tiny", prompt=PROMPT, max_tokens=24, temperature=0, extra_body=extra
        ).choices[0]
        chunks = list(
            client.completions.create(
                model="pythia-tiny", prompt=PROMPT, max_tokens=24, temperature=0, stream=True, extra_body=extra
            )
        )
        assert server.stop() == 0
        assert "parameters, token by token)" in server.log.read_text()
    assert whole.model_extra is not None
    assert whole.model_extra["token_ids"] == expected
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert len(chunks) > 12
