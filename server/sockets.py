"""The port that clients connect to: bound by the supervisor, and inherited by the API processes.

Each API process has a listening socket of its own on the one port, among which the kernel spreads connections. With one
socket for all, whoever wakes up first would take all connections of a burst, and the others none.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator


class PortError(Exception):
    """The server cannot listen where it was told to. The message says what to do."""


def bind_port(host: str, port: int) -> socket.socket:
    """A listening TCP socket on `host` (a name or address) and `port` (0: any free one). Raises PortError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise PortError(f"host: {host} is no address of this machine: {error}") from None
    family, _, _, _, address = found[0]
    with contextlib.ExitStack() as cleanup:
        try:
            listener = cleanup.enter_context(socket.socket(family, socket.SOCK_STREAM))
            # A server that was stopped a moment ago leaves connections in TIME_WAIT, which keep the port from nobody.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            raise PortError(_explain(error, host, port)) from None
        cleanup.pop_all()
    return listener


@contextlib.contextmanager
def bind_ports(
    host: str, port: int, number: int, *, stall_timeout_s: float | None = None
) -> Iterator[list[socket.socket]]:
    """So many listening sockets on one port, closed afterwards. A backlog outlives the process that it is for: what
    connects while one restarts is answered by the next. A client that takes nothing of what it is sent for
    `stall_timeout_s` loses its connection (None: when the kernel gives up by itself). Raises PortError.
    """
    with contextlib.ExitStack() as stack:
        # The first bind is without SO_REUSEPORT: with it, a second server on the port would be no error.
        first = stack.enter_context(bind_port(host, port))
        if number == 1:
            _cut_off_stalled([first], stall_timeout_s)
            yield [first]
            return
        address = first.getsockname()
        first.close()
        listeners = []
        for _ in range(number):
            listener = stack.enter_context(socket.socket(first.family, socket.SOCK_STREAM))
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                listener.bind(address)
                listener.listen(socket.SOMAXCONN)
            except OSError as error:
                raise PortError(_explain(error, host, address[1])) from None
        _cut_off_stalled(listeners, stall_timeout_s)
        yield listeners


def _cut_off_stalled(listeners: list[socket.socket], seconds: float | None) -> None:
    """Accepted connections inherit it. The kernel counts from the moment when the client's window is full."""
    if seconds is None:
        return
    for listener in listeners:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1e3))


def server_url(listener: socket.socket) -> str:
    """Where a client on this machine reaches the socket. A socket bound to every address is reached by loopback."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another program: stop that one, or choose another port with --port"
    if error.errno == errno.EACCES:
        return f"listening on port {port} of {host} is not permitted to this user: choose a port from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host: {host} is no address of this machine: use 127.0.0.1 (this machine only) or 0.0.0.0 (everybody)"
    return f"cannot listen on port {port} of {host}: {os.strerror(error.errno or 0)}"
