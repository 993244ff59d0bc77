from tokenizers import Tokenizer as Library
from tokenizers import models

from engine.token_names import token_names
from engine.tokenizer import Tokenizer
from tests.server.fakes import EOS, tokenizer


def test_text_and_bytes_and_what_is_taken() -> None:
    contents: list[bytes | str] = [b"a", b" a", "漢".encode(), b"\xe6", b"\xe6\xbc", b"", b"a", "é"]
    assert token_names(contents) == [
        "a", " a", "漢", "bytes:\\xe6", "bytes:\\xe6\\xbc", "token_id:5", "token_id:6", "é",
    ]  # fmt: skip


def test_every_token_of_a_vocabulary_has_a_name_of_its_own() -> None:
    served = tokenizer()
    names = [served.token_name(token) for token in range(served.vocab_size + 2)]
    assert len(set(names)) == len(names)
    assert names[EOS] == served.eos_token
    assert names[-1] == f"token_id:{served.vocab_size + 1}"
    assert "".join(names[token] for token in served.encode("The fox said")) == "The fox said"


def test_another_kind_of_vocabulary() -> None:
    words = Library(models.WordLevel({"fox": 0, "dog": 1, "": 2}, unk_token="fox"))
    served = Tokenizer(words)
    assert [served.token_name(token) for token in range(4)] == ["fox", "dog", "token_id:2", "token_id:3"]
