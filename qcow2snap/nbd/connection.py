"""One client on a socket: its handshake under a deadline, then its requests, to the last of them.

Requests come in batches. One tight loop takes all that have arrived: sound READs and WRITEs go to `reads` and `writes`,
which are fast; the rest to `transmission.Answers`. Their replies leave together. How bytes come and go is in `channel`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from formats import nbd
from formats.nbd import Command, CommandFlag
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.channel import RECEIVE, RECEIVE_WRITES, Arrivals, Outbox
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.negotiation import Agreement, ServerNegotiation, TLSMode
from qcow2snap.nbd.read_replies import CutOff
from qcow2snap.nbd.reads import MAX_PENDING, Reads
from qcow2snap.nbd.transmission import Answers, Request, check_magic
from qcow2snap.nbd.writes import Writes

if TYPE_CHECKING:
    from qcow2snap.nbd.tls import SecureSocket

    Secure = Callable[[socket.socket, float], SecureSocket]  # begins TLS, until a deadline (time.monotonic)

logger = logging.getLogger(__name__)

HANDSHAKE_RECEIVE = 1 << 12  # bytes at a time: a handshake is short


class Connection:
    """One client, from its first byte to its last.

    threads  run() in one of its own; stop() and cut_off() from any other
    errors   none: they end this connection, and the log says why
    owns     the socket
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        exports: Exports,
        *,
        handshake_timeout: float,
        tls: TLSMode = TLSMode.OFF,
        secure: Secure | None = None,
    ) -> None:
        self._socket = sock
        self._stream: socket.socket | SecureSocket = sock  # what is said goes through it
        self._tls = tls
        self._secure = secure
        self._peer = peer
        self._exports = exports
        self._handshake_timeout = handshake_timeout
        self._stopping = False
        self.has_chosen = False  # an export: it was no client that only looked

    def run(self) -> None:
        try:
            if agreement_and_unused := self._negotiate():
                self.has_chosen = True
                clients = agreement_and_unused[0].export.clients
                if clients.enter(self):
                    try:
                        self._transmit(*agreement_and_unused)
                    finally:
                        clients.leave(self)
        except (NBDError, CutOff) as error:
            logger.warning("%s: cut off: %s", self._peer, error)
        except TimeoutError:
            logger.warning("%s: cut off: no export chosen within %g s", self._peer, self._handshake_timeout)
        except OSError as error:
            logger.info("%s: gone: %s", self._peer, error)
        except Exception:
            logger.exception("%s: cut off by a fault of this server", self._peer)
        finally:
            self._stream.close()

    def stop(self) -> None:
        """Answer what has arrived, and end. Wakes a recv that waits."""
        self._stopping = True
        self._shutdown(socket.SHUT_RD)

    def cut_off(self) -> None:
        """End now, also in the middle of a reply that nobody receives."""
        self._stopping = True
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        with suppress(OSError):  # it may be gone already
            self._socket.shutdown(how)

    def _negotiate(self) -> tuple[Agreement, bytes] | None:
        """What was agreed on, and the first bytes of the transmission phase. None if the client left."""
        deadline = time.monotonic() + self._handshake_timeout
        negotiation = ServerNegotiation(self._exports, self._tls)
        while not negotiation.ended:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            if data := negotiation.data_to_send():
                self._stream.sendall(data)
            elif negotiation.starts_tls and self._secure:
                self._stream = self._secure(self._socket, deadline)
                negotiation.tls_started()
            elif not negotiation.ended:
                received = self._stream.recv(HANDSHAKE_RECEIVE)
                if not received or self._stopping:
                    return None
                negotiation.receive(received)
        if not isinstance(self._stream, socket.socket):
            self._stream.deadline = None
        self._socket.settimeout(None)
        if negotiation.agreement is None:
            return None
        return negotiation.agreement, negotiation.unused

    def _transmit(self, agreement: Agreement, unused: bytes) -> None:
        logger.info("%s: reads export %a", self._peer, agreement.export.name)
        framing = agreement.framing
        outbox = Outbox(self._stream, is_plain=self._stream is self._socket)
        is_writable = not agreement.node.read_only
        received_at_once = RECEIVE_WRITES if is_writable else RECEIVE
        arrivals = Arrivals(self._stream, framing.request.size, unused, size=received_at_once)
        answers = Answers(agreement)
        reads = Reads(agreement, outbox, answers)
        writes = Writes(agreement, outbox, answers)
        size = agreement.node.size
        read_flags = int(CommandFlag.DF) if framing.structured else 0
        write_flags = int(CommandFlag.FUA | (CommandFlag.PAYLOAD_LEN if framing.extended else 0))
        unpack = framing.request.unpack_from
        expected_magic = framing.request_magic
        buffer = arrivals.buffer

        def before_waiting() -> None:
            writes.finish()  # whose data lie in the buffer that is filled next
            outbox.flush()

        try:
            more = True
            while more:
                if not reads.pending:
                    more = arrivals.wait()
                elif reads.pending < MAX_PENDING:
                    more = arrivals.poll()
                more = more and not self._stopping  # after stop() comes what had arrived before it
                for position in arrivals.requests():
                    magic, flags, command, cookie, offset, length = unpack(buffer, position)
                    if magic != expected_magic:
                        check_magic(magic, framing)
                    if (
                        command == Command.WRITE
                        and is_writable
                        and not flags & ~write_flags
                        and 0 < length <= received_at_once
                        and offset + length <= size
                    ):
                        data = arrivals.whole_payload(length, before_waiting)
                        writes.write(cookie, offset, data, fua=bool(flags & CommandFlag.FUA))
                        continue
                    writes.finish()
                    if (
                        command == Command.READ
                        and not flags & ~read_flags
                        and 0 < length <= nbd.MAX_PAYLOAD
                        and offset + length <= size
                    ):
                        reads.read(cookie, offset, length, whole=bool(flags))
                    elif command == Command.DISC:
                        more = False
                        break
                    else:
                        payload: Iterator[memoryview] = iter(())
                        if payload_length := framing.payload_length(flags, command, length):
                            # The client may wait for earlier replies before it sends the rest of its payload.
                            payload = arrivals.payload(payload_length, before_waiting)
                        for piece in answers.answer(Request(flags, command, cookie, offset, length), payload):
                            outbox.write(piece)
                        for _ in payload:  # what a request that was refused left behind
                            pass
                writes.finish()
                outbox.flush()
                reads.answer_pending(all_of_them=not more)
                outbox.flush()
        except NBDError:
            writes.finish()
            reads.answer_pending(all_of_them=True)  # what was sound before that
            outbox.flush()
            raise
        finally:
            reads.close()
            logger.info("%s: %d bytes of replies from export %a", self._peer, outbox.gone, agreement.export.name)
