"""The engine, with its scheduler, caches and graphs, writes what the reference wrote."""

import pytest

from engine.types import GenerationRequest, SamplingParams
from tests.engine.helpers import DEVICES, GoldenModel
from tests.golden.cases import COMPARABLE, VARIANTS, generations


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlapped", [False, True], ids=["synchronous", "overlapped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generations(variant: str, overlapped: bool, device: str) -> None:
    """All prompts at once in fp32, fewer rows than prompts; those that stop at end-of-text and those that do not."""
    expected: dict[int, tuple[str, list[int]]] = {}
    requests: list[tuple[int, GenerationRequest]] = []
    for case in generations(variant):
        for row in case.comparable_rows:
            answer = case.expected(row)
            params = SamplingParams(temperature=0, max_tokens=len(answer), ignore_eos=not case.stops_at_eos, seed=0)
            request = GenerationRequest.of(
                request_id=len(requests), prompt_token_ids=tuple(case.row_prompt(row)), params=params
            )
            requests.append((request.request_id, request))
            expected[request.request_id] = (f"{case.name}[{row}]", answer)
    core = GoldenModel(variant).core(device=device, max_rows=7, max_waiting=len(requests), overlapped=overlapped)
    core.add(requests)
    tokens: dict[int, list[int]] = {request_id: [] for request_id in expected}
    while core.has_work:
        report = core.step()
        for _, delta in report.deltas if report else ():
            tokens[delta.request_id] += delta.token_ids
    assert len(requests) >= COMPARABLE[variant]
    for request_id, (name, answer) in expected.items():
        assert tokens[request_id] == answer, name
