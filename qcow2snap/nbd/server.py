"""A loop that accepts clients, and the crew that serves each of them. What is said on a connection is elsewhere.

Only this loop accepts, also where worker processes serve (workers.py): it knows of every connection, so that their
number is held over all workers together, that each client goes to the worker with the fewest, and that after a refresh
no client finds the old state. A process that blocked in accept() could not be told any of this.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from qcow2snap.nbd.connection import Connection
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.listen import Listener
from qcow2snap.nbd.negotiation import TLSMode

if TYPE_CHECKING:
    from qcow2snap.nbd.connection import Secure

logger = logging.getLogger(__name__)

STOP_TIMEOUT = 5.0  # seconds that replies in flight get when the server stops
PAUSE = 0.1  # seconds without accepting when the system gave no descriptor or memory for it

# What to call when there is something to be read from a descriptor. Nothing here keeps state in the kernel, as epoll
# does: a process forked off would share it.
Watched = Mapping[int, Callable[[], None]]


class Terms(NamedTuple):
    """What holds for every connection."""

    handshake_timeout: float = 10.0  # seconds until an export must have been chosen
    tls: TLSMode = TLSMode.OFF
    secure: Secure | None = None  # begins TLS where that is not off


class Crew(ABC):
    """Those who serve one state of the exports. A refresh brings a new crew; the old one's clients stay with it.

    threads  all methods from one, that of the server's loop; or from the one that stops it when that has ended
    """

    @property
    @abstractmethod
    def connections(self) -> int:
        """How many are being served."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether a client can be taken now."""

    @abstractmethod
    def take(self, sock: socket.socket, peer: str) -> bool:
        """Serve a client; the socket is the crew's then. False if that cannot be."""

    @abstractmethod
    def retire(self) -> None:
        """No more clients come. What is shared with nobody may go now, the rest with the last client."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether it has retired, and the last client has left."""

    @abstractmethod
    def begin_stop(self) -> None:
        """Answer what has arrived, and end."""

    @abstractmethod
    def end_stop(self, deadline: float) -> None:
        """Wait for that until the deadline (time.monotonic), then cut off who does not receive the answer."""

    def watched(self) -> Watched:
        """What the loop is to watch for this crew."""
        return {}

    def attend(self) -> float | None:
        """Called in every turn of the loop. Gives the seconds until it has to be called again, if it has to."""
        return None


class Threads(Crew):
    """Serves connections in this process, each in a thread of its own."""

    def __init__(
        self,
        exports: Exports,
        terms: Terms,
        *,
        left: Callable[[bool], None] = lambda chosen: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """`left` is called by a connection's thread at its end: had it chosen an export? `close`, with the last one."""
        self._exports = exports
        self._terms = terms
        self._left = left
        self._close = close
        self._threads: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()  # over _threads and _retired
        self._retired = False

    @property
    def connections(self) -> int:
        return len(self._threads)

    def is_ready(self) -> bool:
        return True

    def take(self, sock: socket.socket, peer: str) -> bool:
        connection = Connection(sock, peer, self._exports, **self._terms._asdict())
        thread = threading.Thread(target=self._run, args=[connection], name=f"nbd {peer}", daemon=True)
        with self._lock:
            self._threads[connection] = thread
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            sock.close()
            self._forget(connection)
            return False
        return True

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            last = not self._threads
        if last:
            self._close()

    def is_done(self) -> bool:
        return self._retired and not self._threads

    def begin_stop(self) -> None:
        with self._lock:
            connections = [*self._threads]
        for connection in connections:
            connection.stop()

    def end_stop(self, deadline: float) -> None:
        with self._lock:
            threads = dict(self._threads)
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection, thread in threads.items():
            if thread.is_alive():
                connection.cut_off()
        deadline = time.monotonic() + 1
        for thread in threads.values():  # what is stuck in the kernel ends with the process
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            self._forget(connection)
            self._left(connection.has_chosen)

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            del self._threads[connection]
            last = self._retired and not self._threads
        if last:
            self._close()


class Server:
    """Serves exports on listeners: in a thread of its own from `start` until `stop`, or in the caller's with `run`.

    threads  stop() from any, and start() or run() from one
    owns     the listeners and all connections; the exports only where `close` was given, which then closes them
    """

    def __init__(
        self,
        exports: Exports,
        listeners: Iterable[Listener] = (),
        *,
        max_connections: int = 512,
        handshake_timeout: float = 10.0,
        tls: TLSMode = TLSMode.OFF,
        secure: Secure | None = None,
        workers: int = 0,
        once: bool = False,
        lets_wait: bool = False,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """With two `workers` or more they are processes, and this process must have no other threads.

        `secure` is what tls.Credentials.read gives; it has to be there unless `tls` is off.

        `lets_wait`: where there are `max_connections`, who comes has to wait, and is not refused.

        `once`: stop when the first clients that chose an export have left, and nobody else is there.
        """
        self.listeners = tuple(listeners)
        self._terms = Terms(handshake_timeout, tls, secure)
        self._max_connections = max_connections
        self._workers = workers
        self._once = once
        self._lets_wait = lets_wait
        self._stopping = threading.Event()
        self._chosen = False
        self._pause_until = 0.0
        self._watched: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._finished = False
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[_Timer] = []
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._crews: list[Crew] = []  # the last one takes the clients that come
        self._crews.append(self._new_crew(exports, close))

    # In another thread.

    def start(self) -> None:
        assert self._workers < 2, "worker processes are forked by a process without threads: use run()"
        self._thread = threading.Thread(target=self.run, name="nbd-accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more; answer what has arrived, for STOP_TIMEOUT at most; then cut off who does not receive it."""
        self.request_stop()
        if self._thread:
            self._thread.join()
        self._finish()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # In this thread.

    def run(self) -> None:
        """Serve until `request_stop`, or until the end of `once`. Call stop() then, also after an error."""
        while not self._stopping.is_set():
            self._turn()

    def request_stop(self) -> None:
        """For other threads, and for signal handlers."""
        self._stopping.set()
        self.wake()

    def wake(self) -> None:
        with suppress(OSError):  # it has been told often enough, or is gone
            self._waker.send(b"\0")

    @property
    def wakeup_descriptor(self) -> int:
        """For signal.set_wakeup_fd."""
        return self._waker.fileno()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Have the loop call this. For other threads, and for signal handlers."""
        self._calls.append(call)
        self.wake()

    def call_every(self, seconds: float, call: Callable[[], None]) -> None:
        """Have the loop call this again and again."""
        self._timers.append(_Timer(seconds, call))

    def watch(self, descriptor: int, call: Callable[[], None]) -> None:
        """Have the loop call this when there is something to be read from a descriptor."""
        self._watched[descriptor] = call

    def serve(self, sock: socket.socket, peer: str) -> None:
        """Take a client that no listener has brought, or refuse it where there are too many."""
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connections = self._connections()
        if connections >= self._max_connections:
            logger.warning("%s: refused: %d connections are all there can be", peer, connections)
        elif self._crews[-1].take(sock, peer):
            return
        else:
            logger.warning("%s: refused: no thread, memory or worker is left for it", peer)
        sock.close()

    def serve_only(self, sock: socket.socket, peer: str) -> None:
        """Take this client, and stop when it has left, whatever it has done."""
        self._once = self._chosen = True
        self.serve(sock, peer)

    def refresh(
        self, exports: Exports, *, close: Callable[[], None] = lambda: None, secure: Secure | None = None
    ) -> None:
        """Serve these to whoever comes from now on, by other credentials if they are given. Call it in the loop."""
        self._terms = self._terms._replace(secure=secure or self._terms.secure)
        self._crews[-1].retire()  # first, so that new workers do not inherit what it closes now
        self._crews.append(self._new_crew(exports, close))

    def _new_crew(self, exports: Exports, close: Callable[[], None]) -> Crew:
        if self._workers < 2:
            return Threads(exports, self._terms, left=self._left, close=close)
        from qcow2snap.nbd.workers import Workers

        return Workers(exports, self._terms, self._workers, left=self._left, close=close, inherited=self._inherited)

    def _inherited(self) -> set[int]:
        """What a worker process has from this one and must not keep."""
        ours = {each.socket.fileno() for each in self.listeners} | {self._woken.fileno(), self._waker.fileno()}
        return ours.union(self._watched, *(crew.watched() for crew in self._crews))

    def _connections(self) -> int:
        return sum(crew.connections for crew in self._crews)

    def _left(self, chosen: bool) -> None:
        self._chosen = self._chosen or chosen
        self.wake()

    def _turn(self) -> None:
        timeouts = [*(crew.attend() for crew in self._crews), *(timer.attend() for timer in self._timers)]
        self._crews = [crew for crew in self._crews if not crew.is_done()]
        if self._once and self._chosen and not self._connections():
            self._stopping.set()
            return
        watched: dict[int, Callable[[], None]] = {self._woken.fileno(): self._on_wake, **self._watched}
        for crew in self._crews:
            watched |= crew.watched()
        pause = self._pause_until - time.monotonic()
        if pause > 0:
            timeouts.append(pause)
        elif self._crews[-1].is_ready() and not (self._lets_wait and self._connections() >= self._max_connections):
            watched |= {each.socket.fileno(): partial(self._accept, each) for each in self.listeners}
        poll = select.poll()
        for descriptor in watched:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(_soonest(timeouts)):
            watched[descriptor]()

    def _on_wake(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(1 << 12)
        while self._calls:
            self._calls.popleft()()

    def _accept(self, listener: Listener) -> None:
        try:
            sock, peer = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors or memory, or a client that was gone before its turn: others may fare better.
            logger.warning("a connection could not be accepted: %s", error)
            self._pause_until = time.monotonic() + PAUSE
            return
        self.serve(sock, peer)

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        for listener in self.listeners:
            listener.close()
        crews = self._crews
        deadline = time.monotonic() + STOP_TIMEOUT
        for crew in crews:
            crew.begin_stop()
        for crew in crews:
            crew.end_stop(deadline)
        for crew in crews:
            crew.retire()
        self._woken.close()
        self._waker.close()


class _Timer:
    """Calls something every so many seconds."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self._seconds = seconds
        self._call = call
        self._due = time.monotonic() + seconds

    def attend(self) -> float:
        """Call it if it is time. Gives the seconds until it is again."""
        if time.monotonic() >= self._due:
            self._call()
            self._due = time.monotonic() + self._seconds
        return self._due - time.monotonic()


def _soonest(timeouts: Iterable[float | None]) -> float | None:
    """Milliseconds, for poll()."""
    times = [timeout for timeout in timeouts if timeout is not None]
    return 1000 * max(0.0, min(times)) + 1 if times else None
