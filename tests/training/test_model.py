import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.model import BlockTransformer, DecoderConfig, ModelConfig, split_padding, training_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "lookup_prefix2"
NEVER_USED = "block_decoder.gpt_neox.embed_in.weight"


def small_decoder(layers: int) -> DecoderConfig:
    return DecoderConfig(num_layers=layers, hidden_size=64, num_heads=4, intermediate_size=256)


@pytest.fixture(scope="module")
def model() -> BlockTransformer:
    config = ModelConfig(512, 4, 2048, 16, 2, small_decoder(3), small_decoder(2))
    model = BlockTransformer(config)
    tensors = load_file(GOLDEN / "model.safetensors")
    tensors.pop(NEVER_USED, None)
    model.load_state_dict(tensors)
    return model.eval()


@pytest.fixture(scope="module")
def cases() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


def test_names_and_shapes_are_the_references(model: BlockTransformer) -> None:
    wanted = json.loads((GOLDEN / "resolved_config.json").read_text())["state_dict"]
    wanted.pop(NEVER_USED)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {n: w["shape"] for n, w in wanted.items()}


@pytest.mark.parametrize("case", ["full", "leftpad", "rightpad_eos", "rightpad_eos_noskip", "eval_pppa"])
@torch.no_grad()
def test_logits_equal_the_references(model: BlockTransformer, cases: dict[str, Tensor], case: str) -> None:
    case_ids, mask, block_mask = (
        cases[f"fwd/{case}/{name}"] for name in ("input_ids", "attention_mask", "block_attention_mask")
    )
    logits = model(case_ids.long(), mask.bool(), block_mask.bool())
    valid = cases[f"fwd/{case}/valid"].bool()
    torch.testing.assert_close(logits[valid], cases[f"fwd/{case}/logits"][valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["full", "rightpad_eos"])
@torch.no_grad()
def test_the_loss_equals_the_references(model: BlockTransformer, cases: dict[str, Tensor], case: str) -> None:
    ids, mask = cases[f"fwd/{case}/input_ids"].long(), cases[f"fwd/{case}/attention_mask"].bool()
    loss = training_loss(model, ids.masked_fill(~mask, -1))
    torch.testing.assert_close(loss[None], cases[f"fwd/{case}/loss"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pads_are_no_targets_and_no_keys(model: BlockTransformer) -> None:
    blocks = torch.randint(2, 512, (1, 5, 4), generator=torch.Generator().manual_seed(0))
    blocks[0, 3, :2] = -1
    ids, mask = split_padding(blocks)
    base = model(ids, mask)
    other = ids.clone()
    other[0, 3, :2] = 77
    changed = model(other, mask)
    # Token 2 is predicted at the last pad's own place, token 3 at a real token that must not see the pads. Later blocks
    # do see the pads' ids: the embedder knows no mask.
    torch.testing.assert_close(changed[:, 2, 3], base[:, 2, 3])
    assert not torch.equal(changed[:, 2, 2], base[:, 2, 2])
    assert not torch.equal(changed[:, 3], base[:, 3])
    picked = base.log_softmax(-1).gather(-1, ids[:, 1:, :, None])[..., 0][mask[:, 1:]]
    torch.testing.assert_close(training_loss(model, blocks), -picked.mean())


def test_config_round_trip() -> None:
    config = ModelConfig(block_decoder=DecoderConfig(num_layers=7), token_decoder=DecoderConfig(num_layers=5))
    assert ModelConfig.from_json(config.to_json("float16")) == config
    with pytest.raises(ValueError, match="embedder_size"):
        ModelConfig(embedder_size=32)
