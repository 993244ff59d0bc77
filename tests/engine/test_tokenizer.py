import json
from pathlib import Path

import pytest
from tokenizers import processors

from engine.tokenizer import Tokenizer, TokenizerError
from engine.types import InvalidRequestError
from tests.engine.tokenizers_of_tests import CORPUS, END_OF_TEXT, byte_level, save


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(byte_level(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", ["", "\x00", *CORPUS])
def test_text_survives_a_round_trip(directory: Path, text: str) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sizes_and_the_end_of_text_token(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.vocab_size, tokenizer.eos_token, tokenizer.eos_token_id) == (320, END_OF_TEXT, 0)


def test_a_special_token_in_a_prompt_is_that_token_and_is_not_decoded(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    token_ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert token_ids.count(0) == 1 and len(token_ids) == 3
    assert tokenizer.decode(token_ids) == "ab"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == f"a{END_OF_TEXT}b"


def test_ids_outside_the_vocabulary_stand_for_nothing(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode([*tokenizer.encode("a"), 320, 50303, *tokenizer.encode("b")]) == "ab"


def test_unpaired_surrogates_are_a_fault_of_the_prompt(directory: Path) -> None:
    with pytest.raises(InvalidRequestError, match="unpaired surrogate at character 1") as caught:
        Tokenizer.load(directory).encode("a\ud800")
    assert caught.value.param == "prompt"


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    trained = byte_level()
    trained.enable_truncation(4)
    trained.enable_padding(length=100)
    save(trained, tmp_path)
    assert 4 < len(Tokenizer.load(tmp_path).encode(CORPUS[0])) < 100


@pytest.mark.parametrize("eos_token", [END_OF_TEXT, {"content": END_OF_TEXT, "special": True}])
def test_the_end_of_text_token_is_found_in_both_forms(directory: Path, eos_token: object) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert Tokenizer.load(directory).eos_token_id == 0


@pytest.mark.parametrize("config", [None, "{}", '{"eos_token": null}', "[]"])
def test_a_tokenizer_may_not_say_which_token_ends_a_text(directory: Path, config: str | None) -> None:
    path = directory / "tokenizer_config.json"
    if config is None:
        path.unlink()
    else:
        path.write_text(config)
    assert Tokenizer.load(directory).eos_token_id is None


def test_other_special_tokens_are_known_by_name(directory: Path) -> None:
    config = {"eos_token": END_OF_TEXT, "bos_token": {"content": "<s>"}, "pad_token": "<pad>", "unk_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END_OF_TEXT, "<s>", "<pad>")
    assert tokenizer.unk_token is None


def test_what_the_file_puts_around_a_text_is_added_unless_it_is_not_wanted(tmp_path: Path) -> None:
    trained = byte_level()
    trained.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    save(trained, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    bare = Tokenizer(byte_level()).encode("a fox")
    assert tokenizer.encode("a fox") == [0, *bare]
    assert tokenizer.encode("a fox", add_special_tokens=False) == bare


def test_token_strings_are_those_of_the_vocabulary(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.token_strings([0, *tokenizer.encode("é x"), 320]) == [END_OF_TEXT, "Ã", "©", "Ġ", "x", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing; copy"),
        ("tokenizer.json", b"{}", "is not a tokenizer of the tokenizers library"),
        ("tokenizer.json", b"{", "is not a tokenizer of the tokenizers library"),
        ("tokenizer.json", b"\xff", "cannot read .*tokenizer.json"),
        ("tokenizer_config.json", b"{", "cannot read .*tokenizer_config.json"),
        ("tokenizer_config.json", b"[" * 100_000, "cannot read .*tokenizer_config.json"),
        ("tokenizer_config.json", b'{"eos_token": 3}', "eos_token has to be a text"),
        ("tokenizer_config.json", b'{"bos_token": {"content": 3}}', "bos_token has to be a text"),
        ("tokenizer_config.json", b'{"eos_token": "<none>"}', "eos_token '<none>' is not in the vocabulary"),
    ],
)
def test_broken_files_are_named(directory: Path, name: str, content: bytes | None, message: str) -> None:
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(directory)


def test_a_directory_in_place_of_the_file_is_a_clear_error(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer.load(directory)
