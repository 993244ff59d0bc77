"""What single tokens are called in answers with logprobs: no two of a vocabulary by the same name."""

from collections.abc import Callable, Sequence


def token_names(contents: Sequence[bytes | str]) -> list[str]:
    r"""The names of all tokens: their text; `bytes:\xNN` where they are not whole UTF-8.

    A name that a token before has, and that of a token without text, is `token_id:` and the id.
    """
    names: list[str] = []
    taken: set[str] = set()
    for token, content in enumerate(contents):
        name = content if isinstance(content, str) else _readable(content)
        if not name or name in taken:
            name = unnamed(token)
        taken.add(name)
        names.append(name)
    return names


def unnamed(token: int) -> str:
    """The name of a token by its id alone."""
    return f"token_id:{token}"


def namer(names: Sequence[str]) -> Callable[[int], str]:
    """Looks names up; ids behind the vocabulary have one, too."""
    return lambda token: names[token] if token < len(names) else unnamed(token)


def _readable(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
