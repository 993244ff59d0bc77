"""Lengths, prompts and arrivals of a load."""

import itertools
import random
import statistics
from pathlib import Path

import pytest

from server.bench.messages import Lengths, Prompt
from server.bench.traffic import LONGEST, WORDS, Traffic, TrafficError, arrivals, draw, parse_lengths, read_prompts

FIXED = Lengths(kind="fixed", mean=5)


def traffic(prompts: list[Prompt] | None = None, seed: int = 1, *, words: bool = False) -> Traffic:
    return Traffic(prompts or [], FIXED, FIXED, vocab_size=10, words=words, rng=random.Random(seed))


def test_arrivals_are_seeded() -> None:
    first, again, other = (list(itertools.islice(arrivals(10, random.Random(seed)), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_arrivals_come_at_their_rate_and_as_a_poisson_process() -> None:
    moments = list(itertools.islice(arrivals(50, random.Random(0)), 20_000))
    between = [after - before for before, after in itertools.pairwise(moments)]
    assert statistics.mean(between) == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution the standard deviation is the mean.
    assert statistics.stdev(between) == pytest.approx(1 / 50, rel=0.05)
    assert min(between) > 0


def test_lengths_are_read() -> None:
    assert parse_lengths("128") == Lengths(kind="fixed", mean=128)
    assert parse_lengths("64-256") == Lengths(kind="uniform", low=64, high=256)
    assert parse_lengths("128~0.5") == Lengths(kind="lognormal", mean=128, sigma=0.5)


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "9-5", "5~", "5~9", "5~-1", "5~nan", "1-2-3", "1.5"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(TrafficError, match=r"tokens|lengths"):
        parse_lengths(text)


def test_lengths_have_their_mean_and_bounds() -> None:
    rng = random.Random(0)
    drawn = [draw(parse_lengths("100~0.5"), rng) for _ in range(20_000)]
    assert statistics.mean(drawn) == pytest.approx(100, rel=0.03)
    assert 1 <= min(drawn) < 40
    assert 250 < max(drawn) <= 100 * LONGEST
    assert {draw(parse_lengths("3-5"), rng) for _ in range(200)} == {3, 4, 5}
    assert draw(parse_lengths("1~3"), rng) >= 1


def test_random_prompts_are_seeded_token_ids() -> None:
    prompts = [traffic(seed=1).next(), traffic(seed=1).next(), traffic(seed=2).next()]
    assert prompts[0] == prompts[1] != prompts[2]
    text, max_tokens = prompts[0]
    assert isinstance(text, list)
    assert (len(text), max_tokens) == (5, 5)
    many = traffic()
    assert {token for _ in range(100) for token in many.next()[0]} == set(range(1, 10))


def test_random_words() -> None:
    text, _ = traffic(words=True).next()
    assert isinstance(text, str)
    assert len(text.split()) == 5
    assert set(text.split()) <= set(WORDS)


def test_prompts_of_a_file_come_in_turn_with_their_lengths() -> None:
    prompts = [Prompt("a", 7), Prompt([1, 2]), Prompt("c")]
    source = traffic(prompts)
    drawn = [source.next() for _ in range(6)]
    assert drawn[:3] == drawn[3:]
    assert sorted(drawn[:3], key=str) == sorted([("a", 7), ([1, 2], 5), ("c", 5)], key=str)


def test_files_are_read(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one fox\n\ntwo foxes\n", encoding="utf-8")
    assert read_prompts(lines) == [Prompt("one fox"), Prompt("two foxes")]
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "a", "max_tokens": 3}\n{"prompt": [1, 2], "other": 1}\n', encoding="utf-8")
    assert read_prompts(objects) == [Prompt("a", 3), Prompt([1, 2])]


@pytest.mark.parametrize("line", ["x", "[]", "{}", '{"prompt": 1}', '{"prompt": "a", "max_tokens": "b"}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(TrafficError, match="line 2 is no object"):
        read_prompts(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(TrafficError, match="No such file"):
        read_prompts(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(TrafficError, match="holds no prompt"):
        read_prompts(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TrafficError, match="not UTF-8"):
        read_prompts(tmp_path / "latin")
