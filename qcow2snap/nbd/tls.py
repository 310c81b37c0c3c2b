"""TLS for a server's connections: certificates or pre-shared keys, and a socket's bytes through them.

Bytes go through memory: what is sent is encrypted as a whole and leaves with one system call, not one for each record
of 16 KiB; and the socket stays as it is, so that another thread can shut it down. (ssl.SSLSocket.shutdown would make
it send in the clear what came after.) TLS 1.2 or later, without renegotiation and compression.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from socket import MSG_DONTWAIT
from threading import Lock
from typing import NamedTuple

from qcow2snap.block.node import FileError, NBDError, UnsupportedFeature

RECEIVE = 1 << 16  # bytes of ciphertext at a time
SEND = 1 << 17  # bytes that are encrypted and sent at once: 8 records, which stay in the processor's cache
MAX_PSK_FILE = 1 << 20  # bytes

CA_CERTIFICATE = "ca-cert.pem"
CA_REVOCATIONS = "ca-crl.pem"  # only if it is there
SERVER_CERTIFICATE = "server-cert.pem"
SERVER_KEY = "server-key.pem"


class Credentials(NamedTuple):
    """Where certificates and keys are, named as by nbdkit."""

    certificates: str | None = None  # a directory
    verify_peer: bool = False  # only clients with a certificate that the CA has signed
    psk_file: str | None = None  # lines USERNAME:HEXKEY, as psktool writes them

    def read(self) -> Callable[[socket.socket, float], SecureSocket]:
        """What makes a connection secure with them, until a deadline. FileError, UnsupportedFeature."""
        context = self._context()
        return lambda sock, deadline: SecureSocket(sock, context, deadline)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.num_tickets = 0  # nobody comes back with one: workers share no keys for them
        if self.psk_file is not None:
            _use_keys(context, self.psk_file)
        if self.certificates is not None:
            _use_certificates(context, self.certificates, verify_peer=self.verify_peer)
        return context


def _use_certificates(context: ssl.SSLContext, directory: str, *, verify_peer: bool) -> None:
    certificate, key = os.path.join(directory, SERVER_CERTIFICATE), os.path.join(directory, SERVER_KEY)
    _read(certificate, "server certificate")
    _read(key, "server key")
    try:
        # A key with a passphrase must not stop a server to ask for it.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise FileError(f"{certificate}, {key}: no certificate and its key in PEM: {_reason(error)}") from error
    if not verify_peer:
        return
    authority, revocations = os.path.join(directory, CA_CERTIFICATE), os.path.join(directory, CA_REVOCATIONS)
    _read(authority, "certificate of the CA")
    try:
        context.load_verify_locations(authority)
        if os.path.exists(revocations):
            context.load_verify_locations(revocations)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as error:
        raise FileError(f"{authority}: no certificate in PEM: {_reason(error)}") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _use_keys(context: ssl.SSLContext, filename: str) -> None:
    use = getattr(context, "set_psk_server_callback", None)
    if use is None:
        raise UnsupportedFeature("--tls-psk needs Python 3.13 or later; use certificates: --tls-certificates DIR")
    keys: dict[str | None, bytes] = {}
    for number, line in enumerate(_read(filename, "file of keys").decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, key = line.strip().rpartition(":")
        try:
            keys[name] = bytes.fromhex(key)
        except ValueError:
            keys[name] = b""
        if not name or not keys[name]:
            raise FileError(f"{filename}, line {number}: not USERNAME:HEXKEY, as psktool writes it")
    if not keys:
        raise FileError(f"{filename}: there is no key in it; make one: psktool -u NAME -p {filename}")
    # OpenSSL has no session for a name that it is given no key for, and ends the handshake.
    use(lambda identity: keys.get(identity, b""))
    context.set_ciphers("DEFAULT:PSK")


def _read(filename: str, what: str) -> bytes:
    """OpenSSL's own errors do not say which file it was."""
    try:
        with open(filename, "rb") as file:
            return file.read(MAX_PSK_FILE)
    except OSError as error:
        raise FileError(f"{filename}: the {what} cannot be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


class SecureSocket:
    """A connected socket, its bytes by TLS: what `channel` and `connection` use of a socket, under the same names.

    deadline  time.monotonic() after which recv and send raise TimeoutError, however slowly bytes drip in; None: never
    threads   one that receives, and any that take turns to send; the socket may be shut down from another
    errors    OSError of the socket; NBDError where TLS itself fails
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, deadline: float | None = None) -> None:
        """Shakes hands, which must be done before the deadline."""
        self.family = sock.family
        self.deadline = deadline
        self._socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ciphertext = memoryview(bytearray(RECEIVE))
        self._engine = Lock()  # receiving and sending both change _tls and its buffers
        self._sending = Lock()  # from when ciphertext is taken until it is on its way: its order counts
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send_outgoing()
                if not self._receive_more():
                    raise ConnectionResetError("in the middle of the TLS handshake") from None
            except ssl.SSLError as error:
                with suppress(OSError):
                    self._send_outgoing()  # the alert
                raise NBDError(f"the TLS handshake failed: {_reason(error)}") from error
        self._send_outgoing()

    def fileno(self) -> int:
        return self._socket.fileno()

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._socket.setsockopt(level, option, value)

    def recv_into(self, buffer: memoryview, size: int = 0, flags: int = 0) -> int:
        """As a socket's; of the flags, MSG_DONTWAIT counts."""
        size = size or len(buffer)
        while True:
            if self._incoming.pending or self._tls.pending():
                try:
                    with self._engine:
                        return self._tls.read(size, buffer)  # type: ignore[return-value]
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:  # the client says that it has no more to say
                    return 0
                except ssl.SSLError as error:
                    raise NBDError(f"TLS: {_reason(error)}") from error
                if self._outgoing.pending:
                    self._send_outgoing()
            if not self._receive_more(flags & MSG_DONTWAIT):
                return 0

    def recv(self, size: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """As a socket's: all of it, or the first 128 KiB."""
        try:
            with self._engine:
                count = self._tls.write(data[:SEND])
        except ssl.SSLError as error:
            raise NBDError(f"TLS: {_reason(error)}") from error
        self._send_outgoing()
        return count

    def sendall(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[self.send(view) :]

    def close(self) -> None:
        """Say that it is the end, if that takes no waiting, so that the client knows that nothing was cut off."""
        with suppress(OSError, ValueError):
            with suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self._socket.send(self._outgoing.read(), MSG_DONTWAIT)
        self._socket.close()

    def _receive_more(self, flags: int = 0) -> int:
        self._keep_deadline()
        count = self._socket.recv_into(self._ciphertext, 0, flags)
        with self._engine:
            self._incoming.write(self._ciphertext[:count])
        return count

    def _send_outgoing(self) -> None:
        self._keep_deadline()
        with self._sending:
            with self._engine:
                ciphertext = self._outgoing.read()
            self._socket.sendall(ciphertext)

    def _keep_deadline(self) -> None:
        if self.deadline is not None:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
