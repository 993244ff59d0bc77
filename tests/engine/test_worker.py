"""The engine process's loop with everything real around it but the process."""

from pathlib import Path

from engine.messages import Accepted, Submit
from engine.types import GenerationRequest, SamplingParams
from tests.engine.helpers import MAX_POSITIONS, GoldenModel
from tests.engine.worker_bench import worker_bench

MODEL = GoldenModel("lookup_prefix2")


def long_request(request_id: int, blocks: int = 26) -> GenerationRequest:
    """A short prompt and a long answer."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(range(10 + request_id, 20 + request_id)),
        params=SamplingParams(max_tokens=blocks * MODEL.config.block_length, temperature=0, seed=0, ignore_eos=True),
    )


def test_every_preemption_is_counted_once(tmp_path: Path) -> None:
    pages = MAX_POSITIONS // 8
    core = MODEL.core(max_rows=4, page_size=8, kv_bytes=(pages + 1) * MODEL.page_bytes)
    requests = [long_request(request_id) for request_id in range(4)]
    with worker_bench(core, tmp_path) as bench:
        peer = bench.connect()
        peer.send(Submit(group_id=1, requests=requests))
        bench.turn_until(lambda: peer.finished(0, 1, 2, 3))
        assert peer.of_kind(Accepted)
        for request in requests:
            assert peer.tokens(request.request_id) == MODEL.oracle(request).token_ids
        assert core.preemptions > 0
        bench.turn_until(lambda: bench.counters()["preemptions_total"] >= core.preemptions)
        assert bench.counters()["preemptions_total"] == core.preemptions
