"""Connections to a server for many threads, which can all be cut off at once.

A server may take minutes for an answer. Whoever leaves, as by Ctrl-C, does not wait for it.
"""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import SplitResult

_CONNECT_S = 10.0
"""Most seconds of an attempt to connect, which cannot be cut off."""


class Connections:
    """Makes connections to one server until it is told to cut them off."""

    def __init__(self, place: SplitResult, *, timeout_s: float) -> None:
        """Prepare; nothing is opened.

        Args:
            place: of the server.
            timeout_s: seconds after which there is no answer, or no more of one.
        """
        self._place, self._timeout_s = place, timeout_s
        self._change = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._is_cut = False

    @contextmanager
    def opened(self) -> Iterator[http.client.HTTPConnection]:
        """Yield a new connection, closed at the end.

        Raises:
            OSError: there is no server, it takes too long, or connections are cut off.
        """
        place, is_secure = self._place, self._place.scheme == "https"
        kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        connect_s = min(_CONNECT_S, self._timeout_s)
        with closing(kind(place.hostname or "", place.port, timeout=connect_s)) as connection:
            connection.connect()
            link: socket.socket = connection.sock
            link.settimeout(self._timeout_s)
            with self._change:
                if self._is_cut:
                    raise ConnectionAbortedError("given up")
                self._sockets.add(link)
            # The socket's own limit is for each byte: an answer may bring one at a time.
            is_late = threading.Event()
            limit = threading.Timer(self._timeout_s, _end, (link, is_late))
            limit.daemon = True
            limit.start()
            try:
                yield connection
            finally:
                limit.cancel()
                with self._change:
                    self._sockets.discard(link)
                    self._change.notify_all()
            if is_late.is_set():  # what was read may be a part of an answer
                raise TimeoutError(f"not whole within {self._timeout_s:g} s")

    def cut(self, *, after_s: float) -> None:
        """Refuse new connections, and end the wait of every thread that still uses one.

        Args:
            after_s: seconds that these threads have to end by themselves.
        """
        with self._change:
            self._is_cut = True
            self._change.wait_for(lambda: not self._sockets, after_s)
            for link in self._sockets:
                _end(link)


def _end(link: socket.socket, is_late: threading.Event | None = None) -> None:
    """End the wait of the thread that reads a connection."""
    if is_late is not None:
        is_late.set()
    with suppress(OSError):  # the server was faster
        link.shutdown(socket.SHUT_RDWR)
