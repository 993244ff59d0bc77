import pytest
import torch

from engine.decode_graphs import bucket_of
from engine.types import GenerationRequest, SamplingParams
from tests.engine.eager_pool import EagerPool, use_pool
from tests.engine.helpers import DEVICES, GoldenModel
from tests.engine.test_failures import run, tokens_of


@pytest.mark.parametrize("max_rows", [1, 5, 64, 300, 4096])
def test_a_bucket_holds_its_rows_and_wastes_little(max_rows: int) -> None:
    for rows in range(1, max_rows + 1):
        bucket = bucket_of(rows, max_rows)
        assert rows <= bucket <= max_rows
        assert bucket < rows * 5 / 4 or bucket == rows
    assert len({bucket_of(rows, max_rows) for rows in range(1, max_rows + 1)}) <= 44


def requests_in_turn() -> list[GenerationRequest]:
    """More than there are rows, with answers that end one after the other; the last ones are adjusted."""
    return [
        GenerationRequest.of(
            request_id=index,
            prompt_token_ids=tuple(range(7 + index, 30 + 3 * index)),
            params=SamplingParams(
                max_tokens=20 + index,
                temperature=float(index % 2),
                seed=index,
                ignore_eos=True,
                frequency_penalty=0.4 if index > 6 else 0.0,
            ),
        )
        for index in range(9)
    ]


@pytest.mark.parametrize("max_rows", [5, 10], ids=["full", "padded"])
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["lookup_prefix2", "vanilla_gptneox"])
def test_graphs_give_the_oracles_tokens(
    variant: str, device: str, cuda_graphs: bool, overlapped: bool, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are captured between steps: adjusted ones. The CPU has graphs that do the work again.

    Up to eight rows have a graph of their own; nine are run with a row of padding.
    """
    if torch.device(device).type == "cpu" and cuda_graphs:
        use_pool(monkeypatch, EagerPool())
    model = GoldenModel(variant)
    core = model.core(device=device, max_rows=max_rows, cuda_graphs=cuda_graphs, overlapped=overlapped)
    requests = requests_in_turn()
    answered = run(core, requests)
    for request in requests:
        assert tokens_of(answered[request.request_id]) == model.oracle(request).token_ids
