"""A client's side of TLS: what libnbd's URI parameters mean, as Python's ssl has it. Imported only where it is used."""

from __future__ import annotations

import getpass
import os
import socket
import ssl

from qcow2snap.block.node import FileError, NBDError, UnsupportedFeature
from qcow2snap.nbd.uri import URI, TLSParameters

MAX_PSK_FILE = 1 << 20  # bytes


def secured(sock: socket.socket, uri: URI) -> ssl.SSLSocket:
    """Shake hands on a socket whose next bytes are TLS. The server has to be who the URI says, unless told otherwise.

    A Unix socket has no name that a certificate could be for: there, any certificate of the CA will do.
    """
    name = uri.tls_parameters.hostname or uri.host or None
    context = _context(uri.tls_parameters, check_hostname=name is not None)
    try:
        return context.wrap_socket(sock, server_hostname=name)
    except OSError as error:
        reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
        raise NBDError(f"{uri}: the TLS handshake failed: {reason}") from error


def _context(parameters: TLSParameters, *, check_hostname: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = check_hostname and parameters.verify_peer
    if parameters.psk_file:
        # The key is the server's proof of who it is: it shows no certificate.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        _use_key(context, parameters)
        return context
    if not parameters.verify_peer:
        context.verify_mode = ssl.CERT_NONE
    try:
        if parameters.certificates:
            directory = parameters.certificates
            authority, certificate, key = (
                os.path.join(directory, f"{name}.pem") for name in ("ca-cert", "client-cert", "client-key")
            )
            if parameters.verify_peer:
                context.load_verify_locations(authority)
            if os.path.exists(certificate):
                context.load_cert_chain(certificate, key, password=lambda: b"")  # a passphrase is not asked for
        elif parameters.verify_peer:
            context.load_default_certs()
    except (OSError, ValueError) as error:
        raise FileError(f"{parameters.certificates}: no certificates to use: {error}") from error
    return context


def _use_key(context: ssl.SSLContext, parameters: TLSParameters) -> None:
    use = getattr(context, "set_psk_client_callback", None)
    if use is None:
        raise UnsupportedFeature("tls-psk-file needs Python 3.13 or later; use certificates: tls-certificates=DIR")
    username = parameters.username or getpass.getuser()
    try:
        with open(parameters.psk_file, encoding="ascii") as file:
            lines = file.read(MAX_PSK_FILE).splitlines()
        keys = dict(line.rpartition(":")[::2] for line in lines if ":" in line)
        key = bytes.fromhex(keys[username])
    except (OSError, ValueError) as error:
        raise FileError(f"{parameters.psk_file}: the file of keys cannot be read: {error}") from error
    except KeyError:
        raise FileError(f"{parameters.psk_file}: has no key of {username}; say tls-username=NAME") from None
    use(lambda hint: (username, key))
    context.set_ciphers("PSK")
