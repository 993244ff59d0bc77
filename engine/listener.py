"""A non-blocking AF_UNIX server of message streams, polled between steps: no thread, and no wait for a slow peer."""

import contextlib
import logging
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

from engine.messages import FrameReader, FromEngine, ProtocolError, ToEngine, encode_frame, to_engine_reader

log = logging.getLogger(__name__)

READ_BYTES = 1 << 18
MAX_UNSENT_BYTES = 1 << 28
"""A peer that leaves this much unread has stopped reading: its connection is closed."""


class Connected:
    """A peer connected."""


class Disconnected:
    """A peer is gone, or sent something that is no message and was cut off."""


class _Peer:
    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.reader: FrameReader[ToEngine] = to_engine_reader()
        self.unsent = bytearray()


class MessageListener:
    """Accepts peers on a socket file and exchanges messages with them."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self._gone: list[int] = []
        self._next_id = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    def listen(self, path: Path) -> None:
        """Accept peers on `path` from now on; a socket file that a dead process left there is replaced."""
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def peers(self) -> list[int]:
        """Ids of the connected peers."""
        return list(self._peers)

    def wake(self) -> None:
        """End a `poll` that waits. May be called from any thread."""
        with contextlib.suppress(OSError):
            self._wake_write.send(b"w", socket.MSG_DONTWAIT)

    def poll(self, timeout: float | None) -> Iterator[tuple[int, ToEngine | Connected | Disconnected]]:
        """Wait up to `timeout` seconds (None: until something happens) and yield (peer id, what came)."""
        for key, events in self._selector.select(0 if self._gone else timeout):
            if key.fileobj is self._listener:
                yield from self._accept()
            elif key.fileobj is self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            elif (peer := self._peers.get(key.data)) is not None:
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data, peer)
                if events & selectors.EVENT_READ:
                    yield from self._read(key.data, peer)
        gone, self._gone = self._gone, []
        for peer_id in gone:
            yield peer_id, Disconnected()

    def send(self, peer_id: int, message: FromEngine) -> None:
        """Queue a message and send what the peer takes now. A peer that is gone is reported by the next `poll`."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        peer.unsent += encode_frame(message)
        if len(peer.unsent) > MAX_UNSENT_BYTES:
            log.error("peer %d has left %d bytes unread; closing its connection", peer_id, len(peer.unsent))
            self._close(peer_id)
        else:
            self._flush(peer_id, peer)

    def close(self) -> None:
        """Close every connection and stop listening."""
        for peer_id in self.peers:
            self._close(peer_id)
        self._selector.close()
        for stream in (self._listener, self._wake_read, self._wake_write):
            stream.close()

    def _accept(self) -> Iterator[tuple[int, Connected]]:
        with contextlib.suppress(BlockingIOError):
            while True:
                stream, _ = self._listener.accept()
                stream.setblocking(False)
                peer_id = self._next_id
                self._next_id += 1
                self._peers[peer_id] = _Peer(stream)
                self._selector.register(stream, selectors.EVENT_READ, peer_id)
                yield peer_id, Connected()

    def _read(self, peer_id: int, peer: _Peer) -> Iterator[tuple[int, ToEngine]]:
        try:
            data = peer.stream.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(peer_id)
            return
        try:
            for message in peer.reader.feed(data):
                yield peer_id, message
        except ProtocolError as error:
            log.error("closing the connection of peer %d: %s", peer_id, error)
            self._close(peer_id)

    def _flush(self, peer_id: int, peer: _Peer) -> None:
        try:
            while peer.unsent:
                sent = peer.stream.send(peer.unsent)
                del peer.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._close(peer_id)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        self._selector.modify(peer.stream, events, peer_id)

    def _close(self, peer_id: int) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            self._selector.unregister(peer.stream)
            peer.stream.close()
            self._gone.append(peer_id)
