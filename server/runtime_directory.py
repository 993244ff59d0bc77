"""The supervisor's private directory: sockets between the processes and the configuration files of the children."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "blockserve-"
_LOCK = "lock"
_LONGEST_SOCKET_PATH = 107
"""Bytes. What the kernel takes for the path of an AF_UNIX socket."""
_LONGEST_NAME = len("/engine999.sock")


class RuntimeDirectoryError(Exception):
    """No such directory can be made. The message says what to do."""


@contextlib.contextmanager
def runtime_directory(parent: Path | None = None) -> Iterator[Path]:
    """A new directory that only this user may enter (mode 0700), removed at the end.

    It lies in `parent` (the directory for temporary files). A lock in it is held as long as this process lives: what a
    supervisor that was killed left behind is recognised by a lock that nobody holds, and removed here.
    Raises RuntimeDirectoryError.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    remove_abandoned(parent)
    try:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise RuntimeDirectoryError(f"cannot make a directory in {parent}: {error.strerror}; set TMPDIR") from None
    try:
        if len(os.fsencode(path)) + _LONGEST_NAME > _LONGEST_SOCKET_PATH:
            raise RuntimeDirectoryError(f"{path} is too long for the path of a socket: set TMPDIR to a shorter one")
        with _held_lock(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove this user's runtime directories in `parent` whose supervisor is dead."""
    for path in parent.glob(PREFIX + "*"):
        # Without a lock it is still being made, or not ours.
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with (path / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _held_lock(path: Path) -> Iterator[None]:
    # Locked before it gets its name, so that nobody ever finds it unlocked while this process lives. The descriptor is
    # not inherited: children outlive the supervisor by a moment at most.
    unnamed = path / (_LOCK + ".new")
    with unnamed.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(path / _LOCK)
        yield
