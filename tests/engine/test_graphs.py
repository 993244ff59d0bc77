import pytest
import torch

from engine.graphs import bucket_of
from engine.types import GenerationRequest, SamplingParams
from tests.engine.helpers import GoldenModel


@pytest.mark.parametrize("max_rows", [1, 5, 64, 300, 4096])
def test_a_bucket_holds_its_rows_and_wastes_little(max_rows: int) -> None:
    for rows in range(1, max_rows + 1):
        bucket = bucket_of(rows, max_rows)
        assert rows <= bucket <= max_rows
        assert bucket < rows * 5 / 4 or bucket == rows
    assert len({bucket_of(rows, max_rows) for rows in range(1, max_rows + 1)}) <= 44


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("variant", ["lookup_prefix2", "vanilla_gptneox"])
def test_cuda_gives_the_oracles_tokens(variant: str, cuda_graphs: bool, overlapped: bool) -> None:
    model = GoldenModel(variant)
    core = model.core(device="cuda:0", max_rows=5, cuda_graphs=cuda_graphs, overlapped=overlapped)
    requests = [
        GenerationRequest.of(
            request_id=index,
            prompt_token_ids=tuple(range(7 + index, 30 + 3 * index)),
            params=SamplingParams(max_tokens=20 + index, temperature=float(index % 2), seed=index, ignore_eos=True),
        )
        for index in range(9)
    ]
    core.add([(request.request_id, request) for request in requests])
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    while core.has_work:
        report = core.step()
        for _, delta in report.deltas if report else ():
            tokens[delta.request_id] += delta.token_ids
    for request in requests:
        assert tokens[request.request_id] == model.oracle(request).token_ids
