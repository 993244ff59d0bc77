"""How commands end."""

import sys

EXIT_DONE = 0
EXIT_FAILED = 1
"""Something went wrong, or not all that was asked for was done."""
EXIT_BAD_INPUT = 2
"""A setting or an argument that cannot be used; argparse exits with it too."""
EXIT_INTERRUPTED = 130
"""By Ctrl-C, as shells count it."""


def complain(command: str, message: str, code: int) -> int:
    """Say on stderr why the command ends; returns the code."""
    sys.stderr.write(f"{command}: {message}\n")
    return code
