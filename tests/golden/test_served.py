"""The served model (paged cache, scratch cache, kernels) computes what the reference computed."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.model.build import build_model
from engine.model.model import Model
from kernels.dispatch import Kernels, torch_kernels, triton_kernels
from tests.engine.model.paged import CPU, PagedRun
from tests.golden.cases import (
    BLOCK_VARIANTS,
    VARIANTS,
    assert_embeddings,
    assert_logits,
    config,
    forward_case,
    generations,
    weights,
)

CUDA = torch.device("cuda")
CASES: list[tuple[str, Kernels, torch.device]] = [
    ("torch-cpu", torch_kernels(), CPU),
    # As for few positions on a GPU.
    ("late-norm-cpu", replace(torch_kernels(), late_norm_positions=1000), CPU),
]
if torch.cuda.is_available():
    CASES += [
        ("triton-cuda", triton_kernels(), CUDA),
        ("norm-in-front-cuda", replace(triton_kernels(), late_norm_positions=0), CUDA),
    ]


@dataclass(frozen=True)
class Served:
    """A model on a device."""

    model: Model
    device: torch.device

    def run(self, rows: int) -> PagedRun:
        """An empty cache for a number of rows."""
        return PagedRun(self.model, rows, device=self.device)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def served(request: pytest.FixtureRequest, variant: str) -> Served:
    _name, kernels, device = request.param
    tensors = {name: tensor.to(device) for name, tensor in weights(variant).items()}
    return Served(build_model(config(variant), tensors, kernels), device)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_full_case(served: Served, variant: str, cut: int) -> None:
    """Positions in front of `cut` are prefilled, those behind it decoded; blocks are forced on the token decoder."""
    case = forward_case(variant, "full")
    ids = case["input_ids"]
    run = served.run(rows=len(ids))
    run.prefill([(row, 0, ids[row, :cut]) for row in range(len(ids)) if cut])
    for position in range(cut, ids.shape[1]):
        context = run.decode(ids[:, position])
        assert_embeddings(context.cpu(), case["context_embeddings"][:, position])
        if position + 1 < ids.shape[1]:
            assert_logits(run.forced_logits(context, ids[:, position + 1]).cpu(), case["logits"][:, position])


@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_embed(served: Served, variant: str) -> None:
    case = forward_case(variant, "full")
    assert_embeddings(
        served.model.embed(case["input_ids"].flatten(0, 1).to(served.device)).cpu(),
        case["block_embeddings"].flatten(0, 1),
    )


def test_greedy_generations(served: Served, variant: str) -> None:
    """Single runs without stopping, all prompts of a batch at once and left padded as the engine pads them."""
    length = config(variant).block_length
    cases = [case for case in generations(variant) if not case.stops_at_eos and len(case.prompt) == 1]
    prompts = []
    for case in cases:
        prompt = case.row_prompt(0)
        prompts.append(torch.tensor([0] * (-len(prompt) % length) + prompt).view(-1, length))
    run = served.run(rows=len(cases))
    run.prefill([(row, 0, prompt[:-1]) for row, prompt in enumerate(prompts) if len(prompt) > 1])
    block = torch.stack([prompt[-1] for prompt in prompts])
    written: list[Tensor] = []
    for _step in range(-(-40 // length)):
        block = run.model.write_block(run.decode(block), run.scratch, lambda logits, _place: logits.argmax(-1))
        written.append(block)
    answers = torch.cat(written, dim=1).tolist()
    assert len(cases) >= 10
    for case, answer in zip(cases, answers, strict=True):
        expected = case.expected(0)
        assert answer[: len(expected)] == expected[: len(answer)], case.name
