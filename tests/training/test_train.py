import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training import sample
from training.card import write_card
from training.corpus import HELDOUT_FILES, TRAINING_FILES
from training.evaluate import bits_per_byte, cut_windows, ratio, token_bytes
from training.export import load_model, load_tokenizer, save_model
from training.model import BlockTransformer, DecoderConfig, ModelConfig
from training.muon import orthogonal
from training.tokenizer import train_tokenizer
from training.train import TrainOptions, main, parse_mix

WORDS = ["the", "little", "girl", "boy", "dog", "found", "saw", "big", "red", "ball", "and", "then", "played", "12"]


def write_corpus(folder: Path) -> None:
    rng = random.Random(0)
    for file in (*TRAINING_FILES.values(), *HELDOUT_FILES.values()):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 120))) + "." for _ in range(12)]
        (folder / file).write_bytes(lzma.compress("".join(f"{t}\n<|endoftext|>\n" for t in texts).encode()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus and the folder of a run of twenty steps."""
    corpus, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("out")
    write_corpus(corpus)
    flags = "--device cpu --steps 20 --batch-tokens 512 --long-window 256 --short-window 128 --warmup 2 --log-every 1"
    sizes = "--vocab-size 300 --width 32 --heads 2 --block-layers 1 --token-layers 1 --validation-share 0.1"
    main(["--corpus", str(corpus), "--out", str(out), "--learning-rate", "0.01", *flags.split(), *sizes.split()])
    return corpus, out


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_twenty_steps_lower_the_loss(trained: tuple[Path, Path]) -> None:
    losses = [record["loss"] for record in read_log(trained[1]) if "loss" in record]
    assert len(losses) == 20
    assert sum(losses[-3:]) < sum(losses[:3]) - 1.5


def test_a_run_leaves_model_and_figures(trained: tuple[Path, Path]) -> None:
    out = trained[1]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16" and config["max_length"] == 256
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer_config["eos_token"] == tokenizer_config["pad_token"] == "<|endoftext|>"
    heldout = json.loads((out / "heldout.json").read_text())
    assert set(heldout) == set(HELDOUT_FILES)
    assert 0.5 < heldout["tinystories_heldout"]["mean"] < 8
    run = json.loads((out / "run.json").read_text())
    assert run["tokens"] == 20 * 512 and run["options"]["dropout"] == 0.1


def test_the_card(trained: tuple[Path, Path]) -> None:
    out = trained[1]
    (out / "samples.json").write_text(json.dumps([{"seed": 3, "prompt": "Once", "text": " upon\na time."}]))
    write_card(out, out, "2026-11-23", "Temperature 0.8.")
    card = (out / "MODEL_CARD.md").read_text()
    assert "Seed 3:\n\n> Once upon\n> a time." in card
    assert (out / "loss_curve.png").stat().st_size > 1000
    pictured = (out / "loss_curve.png").read_bytes()
    write_card(out, out, "2026-11-23", "Temperature 0.8.")
    assert (out / "loss_curve.png").read_bytes() == pictured


def test_the_engine_serves_what_was_trained(trained: tuple[Path, Path], tmp_path: Path) -> None:
    outputs = [tmp_path / "first.json", tmp_path / "second.json"]
    for output in outputs:
        flags = ["--prompt", "the little girl", "--seeds", "2", "--max-tokens", "21"]
        sample.main(["--model", str(trained[1]), "--out", str(output), *flags])
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first == second
    assert [answer["seed"] for answer in first] == [0, 1]
    assert first[0]["text"] != first[1]["text"]


def test_export_round_trip(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    config = ModelConfig(300, 4, 256, 8, 2, DecoderConfig(num_layers=2, **sizes), DecoderConfig(num_layers=1, **sizes))
    model = BlockTransformer(config)
    model.initialise()
    save_model(model, tmp_path, "float32", limit=50_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    save_model(model, tmp_path, "float16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    with pytest.raises(ValueError, match="larger than a shard"):
        save_model(model, tmp_path, "float16", limit=100)


def test_the_tokenizer_loses_nothing() -> None:
    tokenizer = train_tokenizer(["a few words", "of 1234 words"], 280)
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    text = "naïve  \t\r\n 😀 2026 <b> \u0000\u00ad"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text
    assert not any(len([c for c in token if c.isdigit()]) > 1 for token in encoded.tokens)
    assert token_bytes(tokenizer)[encoded.ids].sum() == len(text.encode())


def test_long_documents_are_cut_and_only_the_last_piece_ends() -> None:
    sizes = np.full(100, 2, dtype=np.int64)
    ids = np.arange(1, 24, dtype=np.uint16)
    found = cut_windows([ids], sizes, 3, 4, 12)
    assert [w.blocks.ravel().tolist() for w in found] == [
        [-1, -1, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [-1, -1, -1, 10, 11, 12, 13, 14, 15, 16, 17, 18],
        [-1, -1, -1, 19, 20, 21, 22, 23, 0, -1, -1, -1],
    ]
    assert [w.predicted_bytes for w in found] == [16, 16, 8]
    assert [w.predicted_bytes for w in cut_windows([ids], sizes, 0, 4, 12)] == [16, 14]


@torch.no_grad()
def test_bits_do_not_depend_on_the_batch(trained: tuple[Path, Path]) -> None:
    model, tokenizer = load_model(trained[1]).eval(), load_tokenizer(trained[1])
    sizes = token_bytes(tokenizer)
    documents = [np.array(tokenizer.encode(" ".join(WORDS[:n])).ids, dtype=np.uint16) for n in (2, 5, 19)]
    together = bits_per_byte(model, documents, sizes, 1)
    alone = [bits_per_byte(model, [document], sizes, 1)[0] for document in documents]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert ratio(alone) == pytest.approx(sum(b for b, _ in alone) / sum(n for _, n in alone))


@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 16)])
def test_muon_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(g).float())
    assert values.min() > 0.4 and values.max() < 1.5


def test_rate_and_mix_follow_the_steps() -> None:
    options = TrainOptions(steps=100, warmup=10, late_share=0.25)
    rates = [options.rate(step) for step in range(100)]
    assert max(rates) == rates[10] == pytest.approx(options.learning_rate)
    assert rates[0] == pytest.approx(options.learning_rate / 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert options.mix(74) == options.early_mix and options.mix(75) == options.late_mix
    assert parse_mix("a=0.5,b=1") == {"a": 0.5, "b": 1.0}
