"""Text to token ids and back, over the tokenizers library. Torch-free."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from engine.detokenizer import ByteLevelDecoder, IncrementalDecoder, StreamDecoder, byte_level_table
from engine.token_bounds import longest_token_bytes
from engine.token_names import namer, token_names
from engine.types import InvalidRequestError

SPECIAL_TOKENS = ("eos_token", "bos_token", "pad_token", "unk_token")
"""Names under which tokenizer_config.json tells how these tokens read."""


class TokenizerError(ValueError):
    """A model directory without a usable tokenizer. The message names the file at fault and what to do."""


class Tokenizer:
    """A model's tokenizer. Immutable, so any number of answers may share one."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_token: str | None = None,
        *,
        bos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
    ) -> None:
        """Serve `tokenizer`, whose end-of-text token reads `eos_token`. Raises TokenizerError if it has none such.

        The other tokens are for clients that ask what they are called; nothing here uses them.
        """
        # A file may carry the truncation and padding of its training: prompts would be cut or filled silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._token_bytes = {skip: byte_level_table(tokenizer, skip_special_tokens=skip) for skip in (True, False)}
        self._longest_bytes = longest_token_bytes(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Token ids are below this. A model's own vocabulary may be larger: the rest decodes to nothing."""
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.pad_token = pad_token
        self.unk_token = unk_token
        self.eos_token_id = None if eos_token is None else tokenizer.token_to_id(eos_token)
        """None where the tokenizer does not say which token ends a text."""
        if eos_token is not None and self.eos_token_id is None:
            raise TokenizerError(
                f"tokenizer_config.json: eos_token {eos_token!r} is not in the vocabulary of tokenizer.json"
            )

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json of a model directory, and tokenizer_config.json if it is there. Raises TokenizerError."""
        path = directory / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(
                f"{path} is missing; copy the tokenizer.json that the model was trained with there"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read {path}: {error}") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
            raise TokenizerError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None
        return cls(tokenizer, **_special_tokens(directory / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Text that spells a special token is that token.

        `add_special_tokens` adds what tokenizer.json says belongs around a text; for most models that is nothing.
        Raises InvalidRequestError for text that is not Unicode (unpaired surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                "prompt", f"the prompt is not valid Unicode: unpaired surrogate at character {error.start}"
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that the text certainly has, known at once: a far too long one need not be encoded."""
        if self._longest_bytes is None:
            return 0
        return -(-len(text.encode("utf-8", "surrogatepass")) // self._longest_bytes)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all these ids at once. Ids outside the vocabulary stand for nothing."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def text_bytes(self, token_ids: Sequence[int]) -> int:
        """Bytes of UTF-8 that these tokens stand for; special tokens for none."""
        table = self._token_bytes[True]
        if table is None:
            return len(self.decode(token_ids).encode())
        return sum(len(table[token]) for token in token_ids if token < len(table))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each token, which is not its text; "" for ids outside of it."""
        return [self._tokenizer.id_to_token(token) or "" for token in token_ids]

    @cached_property
    def token_name(self) -> Callable[[int], str]:
        """What a token is called where it stands alone (`engine.token_names`)."""
        contents: Sequence[bytes | str] | None = self._token_bytes[False]
        if contents is None:
            # Alone, bytes that are part of a character read U+FFFD: such tokens are called as the vocabulary has them.
            texts = self._tokenizer.decode_batch([[token] for token in range(self.vocab_size)], False)
            spelled = self.token_strings(range(self.vocab_size))
            contents = [name if "\ufffd" in text else text for text, name in zip(texts, spelled, strict=True)]
        return namer(token_names(contents))

    def new_decoder(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """Decodes one answer as it comes."""
        table = self._token_bytes[skip_special_tokens]
        if table is None:
            return StreamDecoder(self._tokenizer, skip_special_tokens=skip_special_tokens)
        return ByteLevelDecoder(table)


def _special_tokens(path: Path) -> dict[str, str | None]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from None
    return {name: _special_token(path, config, name) for name in SPECIAL_TOKENS} if isinstance(config, dict) else {}


def _special_token(path: Path, config: dict[str, object], name: str) -> str | None:
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise TokenizerError(f"{path}: {name} has to be a text or an object with a text as its content")
    return token
