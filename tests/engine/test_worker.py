"""The engine process's loop with everything real around it but the process."""

import dataclasses
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from engine.messages import (
    Accepted,
    ChildReady,
    Deltas,
    Rejected,
    Submit,
    ToSupervisor,
    encode_frame,
    to_supervisor_reader,
)
from engine.process_config import EngineOptions, EngineProcessConfig, LogConfig, write_process_config
from engine.types import GenerationRequest, SamplingParams, ScoreRequest, pack_tokens
from engine.worker import StepFailedError
from kernels.dispatch import Kernels, torch_kernels
from tests.engine.helpers import MAX_POSITIONS, GoldenModel
from tests.engine.worker_bench import worker_bench

MODEL = GoldenModel("lookup_prefix2")


def long_request(request_id: int, blocks: int = 26) -> GenerationRequest:
    """A short prompt and a long answer."""
    return GenerationRequest.of(
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


def score_request(request_id: int, tokens: int = 9) -> ScoreRequest:
    return ScoreRequest(request_id=request_id, text=pack_tokens(range(tokens)), top=1)


def test_scores_go_to_who_asked_for_them(tmp_path: Path) -> None:
    core = MODEL.core(max_rows=2)
    with worker_bench(core, tmp_path) as bench:
        first, second = bench.connect(), bench.connect()
        first.send(Submit(group_id=1, requests=[long_request(0, 1)], scores=[score_request(1), score_request(2)]))
        second.send(Submit(group_id=1, requests=[], scores=[score_request(1, 5)]))
        bench.turn_until(lambda: first.finished(0, 1, 2) and second.finished(1))
        assert [len(first.deltas(request_id)[0].logprobs) for request_id in (1, 2)] == [8, 8]
        assert [len(delta.logprobs) for delta in second.deltas(1)] == [4]
        assert first.tokens(0) == MODEL.oracle(long_request(0, 1)).token_ids
        # Their ids are free again.
        first.send(Submit(group_id=2, requests=[], scores=[score_request(1)]))
        bench.turn_until(lambda: len(first.deltas(1)) == 2)


def test_groups_with_scores_are_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    core = MODEL.core(max_rows=2)
    with worker_bench(core, tmp_path) as bench:
        peer = bench.connect()
        peer.send(Submit(group_id=1, requests=[long_request(5)], scores=[score_request(5)]))
        peer.send(Submit(group_id=2, requests=[long_request(6)], scores=[score_request(7, 0)]))
        bench.turn_until(lambda: len(peer.of_kind(Rejected)) == 2)
        assert [message.param for message in peer.of_kind(Rejected)] == ["request_id", "prompt"]
        assert not core.has_work


def test_who_hangs_up_leaves_no_text_behind(tmp_path: Path) -> None:
    core = MODEL.core(max_rows=2, max_step_positions=3)
    with worker_bench(core, tmp_path) as bench:
        peer = bench.connect()
        peer.send(Submit(group_id=1, requests=[], scores=[score_request(number, 90) for number in range(8)]))
        bench.turn_until(lambda: bool(peer.of_kind(Accepted)))
        peer.close()
        bench.turn_until(lambda: not core.has_work)


def breaking_kernels(products: int) -> Kernels:
    """Kernels that fail for good after so many products."""
    whole = torch_kernels()
    left = products

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return whole.linear(x, weight, bias)

    return dataclasses.replace(whole, linear=linear)


@pytest.mark.parametrize("overlapped", [False, True], ids=["synchronous", "overlapped"])
def test_a_step_that_fails_is_logged_and_ends_the_loop(
    tmp_path: Path, overlapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    core = MODEL.core(kernels=breaking_kernels(150), max_rows=2, overlapped=overlapped)
    with worker_bench(core, tmp_path) as bench:
        peer = bench.connect()
        peer.send(Submit(group_id=1, requests=[long_request(5), long_request(8)]))
        with caplog.at_level(logging.ERROR, logger="engine"), pytest.raises(StepFailedError):
            bench.worker.run()
        (record,) = caplog.records
        steps = sum(bool(message.unpacked()) for message in peer.of_kind(Deltas))
        assert vars(record)["requests"] == [5, 8]
        assert vars(record)["step"] == steps + (2 if overlapped else 1)
        assert record.exc_info is not None and "illegal memory access" in str(record.exc_info[1])


FAILING_PROCESS = """
import sys
from engine import worker
from tests.engine.test_worker import MODEL, breaking_kernels
worker._load_core = lambda config: MODEL.core(kernels=breaking_kernels(150), max_rows=2)
sys.exit(worker.main(sys.argv[1]))
"""


def test_a_process_whose_step_fails_exits_with_an_error(tmp_path: Path) -> None:
    config = tmp_path / "engine.json"
    control_path, engine_path = tmp_path / "control.sock", tmp_path / "engine.sock"
    write_process_config(
        config,
        EngineProcessConfig(
            index=0, name="m", model="unused", options=EngineOptions(), socket_path=str(engine_path),
            control_path=str(control_path), log=LogConfig(),
        ),
    )  # fmt: skip
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(control_path))
        listener.listen()
        listener.settimeout(60)
        process = subprocess.Popen(
            [sys.executable, "-c", FAILING_PROCESS, str(config)], stderr=subprocess.PIPE, text=True
        )
        try:
            supervisor, _ = listener.accept()
            with supervisor:
                supervisor.settimeout(60)
                frames, told = to_supervisor_reader(), list[ToSupervisor]()
                while not any(isinstance(message, ChildReady) for message in told):
                    told += frames.feed(supervisor.recv(1 << 16))
                client.connect(str(engine_path))
                client.sendall(encode_frame(Submit(group_id=1, requests=[long_request(5)])))
                log = process.communicate(timeout=60)[1]
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 1
    assert "a step failed" in log and "requests=[5]" in log and "illegal memory access" in log
