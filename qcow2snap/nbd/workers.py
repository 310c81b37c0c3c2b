"""Worker processes: read-only exports on all processors, and a crash costs one worker's clients only.

Workers are forked by a process without threads. What was opened and read before is in memory once, for all of them.
A worker has one channel to its parent: on it come the clients' sockets, back goes a byte for each that has left, and
its end is the order to stop. That also comes when the parent dies, however it does: no worker is ever left behind.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.server import STOP_TIMEOUT, Crew, Terms, Threads, Watched

logger = logging.getLogger(__name__)

RESPAWN = 1.0  # seconds from a worker's start to its successor's, at least
KILL_AFTER = 2.0  # seconds beyond STOP_TIMEOUT that a worker gets to end by itself
MAX_PEER = 256  # bytes of a client's name for the log

CHOSEN, NOT_CHOSEN = b"+", b"-"  # what a worker says of a client that has left


class Worker:
    """One process, seen from its parent.

    connections  that it serves, or that are on their way to it
    """

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel = channel
        self.pid = pid
        self.started = time.monotonic()
        self.connections = 0

    def send(self, sock: socket.socket, peer: str) -> bool:
        try:
            socket.send_fds(self.channel, [ascii(peer)[1:-1][:MAX_PEER].encode()], [sock.fileno()])
        except OSError:  # it is dead, or has not taken what was sent before
            return False
        self.connections += 1
        return True

    def dismiss(self) -> None:
        """Tell it to stop. Its end of the channel is closed when it has."""
        with suppress(OSError):  # it is dead
            self.channel.shutdown(socket.SHUT_WR)

    def bury(self) -> None:
        """Wait for a process that has closed its end of the channel, as only its end does."""
        self.channel.close()
        with suppress(ChildProcessError):  # somebody else has waited for it
            os.waitpid(self.pid, 0)


class Workers(Crew):
    """A fixed number of worker processes, those that crash replaced."""

    def __init__(
        self,
        exports: Exports,
        terms: Terms,
        count: int,
        *,
        left: Callable[[bool], None],
        close: Callable[[], None],
        inherited: Callable[[], Iterable[int]],
    ) -> None:
        """`left` and `close` as for Threads. `inherited`: descriptors of this process that are none of a worker's."""
        self._exports = exports
        self._terms = terms
        self._left = left
        self._close = close
        self._inherited = inherited
        self._retired = False
        self._workers: list[Worker] = []
        self._leaving: list[Worker] = []  # were told to stop
        self._respawn: list[float] = []  # when (time.monotonic) those that are missing are to be started
        gc.freeze()  # a collection in a worker would write to, and so copy, every page that holds an object
        for _ in range(count):
            self._spawn()

    @property
    def connections(self) -> int:
        return sum(worker.connections for worker in self._workers)

    def is_ready(self) -> bool:
        return bool(self._workers)

    def take(self, sock: socket.socket, peer: str) -> bool:
        for worker in sorted(self._workers, key=lambda each: each.connections):
            if worker.send(sock, peer):
                sock.close()
                return True
        return False

    def retire(self) -> None:
        if not self._retired:
            self._retired = True
            self._close()
            self._dismiss_idle()

    def is_done(self) -> bool:
        return self._retired and not self._workers and not self._leaving

    def begin_stop(self) -> None:
        self._respawn.clear()
        for worker in [*self._workers]:
            self._dismiss(worker)

    def end_stop(self, deadline: float) -> None:
        deadline += KILL_AFTER
        while self._leaving:
            poll = select.poll()
            for descriptor in self.watched():
                poll.register(descriptor, select.POLLIN)
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            watched = self.watched()
            for descriptor, _ in ready:
                watched[descriptor]()
        for worker in self._leaving:
            logger.warning("worker %d did not end, and is killed", worker.pid)
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.bury()
        self._leaving.clear()

    def watched(self) -> Watched:
        return {worker.channel.fileno(): partial(self._hear, worker) for worker in [*self._workers, *self._leaving]}

    def attend(self) -> float | None:
        now = time.monotonic()
        for due in [due for due in self._respawn if due <= now]:
            self._respawn.remove(due)
            self._spawn()
        return min(self._respawn) - now if self._respawn else None

    def _hear(self, worker: Worker) -> None:
        """A worker says that a client has left, or nothing any more."""
        try:
            said = worker.channel.recv(1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said:
            worker.connections -= 1
            self._left(said == CHOSEN)
        else:
            self._bury(worker)
        if self._retired:
            self._dismiss_idle()

    def _bury(self, worker: Worker) -> None:
        worker.bury()
        if worker in self._leaving:
            self._leaving.remove(worker)
            return
        logger.warning("worker %d has crashed; %d clients lost their connection", worker.pid, worker.connections)
        self._workers.remove(worker)
        if not self._retired:
            self._respawn.append(worker.started + RESPAWN)

    def _dismiss(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._leaving.append(worker)
        worker.dismiss()

    def _dismiss_idle(self) -> None:
        for worker in [worker for worker in self._workers if not worker.connections]:
            self._dismiss(worker)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # A worker leaves them blocked: a terminal or systemd sends them to all processes, and the parent decides.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            logger.warning("a worker could not be started: %s", error.strerror)
            self._respawn.append(time.monotonic() + RESPAWN)
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            if pid > 0:
                self._workers.append(Worker(ours, pid))
            else:
                ours.close()
            return
        status = 1
        try:
            for descriptor in {ours.fileno(), *self.watched(), *self._inherited()}:
                os.close(descriptor)
            _work(theirs, self._exports, self._terms)
            status = 0
        except BaseException:
            logger.exception("a worker failed")
        finally:
            os._exit(status)  # the rest of the stack belongs to the parent


def _work(channel: socket.socket, exports: Exports, terms: Terms) -> None:
    """A worker's life: serve what comes, until the parent says or has nothing more to say."""

    def left(chosen: bool) -> None:
        with suppress(OSError):  # the parent listens no more
            channel.send(CHOSEN if chosen else NOT_CHOSEN)

    threads = Threads(exports, terms, left=left)
    while True:
        peer, descriptors, _, _ = socket.recv_fds(channel, MAX_PEER, 1)
        if not peer:
            break
        if not descriptors or not threads.take(socket.socket(fileno=descriptors[0]), peer.decode()):
            logger.warning("%s: a connection could not be accepted: no descriptor or no thread is left", peer.decode())
            left(False)
    threads.begin_stop()
    threads.end_stop(time.monotonic() + STOP_TIMEOUT)
