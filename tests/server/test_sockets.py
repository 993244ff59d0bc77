"""Binding the port."""

import contextlib
import errno
import os
import socket

import pytest

from server.sockets import PortError, bind_port, bind_ports, server_url


def test_a_bound_port_takes_connections_and_has_a_url() -> None:
    with bind_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert server_url(listener) == f"http://127.0.0.1:{port}"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with bind_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortError, match=rf"port {port} on 127.0.0.1 is in use .* --port"):
            bind_port("127.0.0.1", port)


def test_a_port_can_be_bound_again_right_after_a_connection_on_it() -> None:
    with bind_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            listener.accept()[0].close()  # the closing side keeps the connection in TIME_WAIT
    bind_port("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70 + ".x", "1.2.3.4.5"])
def test_an_address_of_somebody_else_is_refused(host: str) -> None:
    with pytest.raises(PortError, match="is no address of this machine"):
        bind_port(host, 0)


@pytest.mark.skipif(os.getuid() == 0, reason="root may bind any port")
def test_a_privileged_port_is_refused_with_what_to_do() -> None:
    with pytest.raises(PortError, match="from 1024 on"):
        bind_port("127.0.0.1", 1)


def test_every_address_is_reached_by_loopback() -> None:
    with bind_port("0.0.0.0", 0) as listener:
        assert server_url(listener).startswith("http://127.0.0.1:")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_is_bracketed() -> None:
    try:
        listener = bind_port("::1", 0)
    except PortError:
        pytest.skip("no IPv6 loopback here")
    with listener:
        assert server_url(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_connections_to_one_port_are_spread_over_its_sockets() -> None:
    with bind_ports("127.0.0.1", 0, 3) as listeners:
        assert len({listener.getsockname() for listener in listeners}) == 1
        clients = [socket.create_connection(listeners[0].getsockname(), timeout=5) for _ in range(60)]
        taken = []
        for listener in listeners:
            listener.setblocking(False)
            taken.append(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    taken[-1] += 1
        for client in clients:
            client.close()
    assert sum(taken) == 60
    assert all(taken)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
def test_a_port_with_several_sockets_is_still_one_servers(first: int, second: int) -> None:
    with bind_ports("127.0.0.1", 0, first) as listeners:
        port = listeners[0].getsockname()[1]
        with pytest.raises(PortError, match="in use"), bind_ports("127.0.0.1", port, second):
            pass
    with bind_ports("127.0.0.1", port, second) as listeners:
        assert len(listeners) == second


def test_a_client_that_takes_nothing_is_cut_off_on_every_socket() -> None:
    for number in (1, 2):
        with bind_ports("127.0.0.1", 0, number, stall_timeout_s=1.5) as listeners:
            for listener in listeners:
                assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


def test_the_kernel_cuts_off_a_client_that_takes_nothing() -> None:
    with contextlib.ExitStack() as stack:
        (listener,) = stack.enter_context(bind_ports("127.0.0.1", 0, 1, stall_timeout_s=0.1))
        stack.enter_context(socket.create_connection(listener.getsockname()))
        stream = stack.enter_context(listener.accept()[0])
        stream.settimeout(10)
        with pytest.raises(TimeoutError) as caught:
            stream.sendall(bytes(64 << 20))
        # Of the connection, not of this call.
        assert caught.value.errno == errno.ETIMEDOUT
