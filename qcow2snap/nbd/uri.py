"""NBD URIs, as the NBD project's doc/uri.md has them. Text only: nothing is connected or looked up."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from formats.nbd import NBD_PORT
from qcow2snap.block.node import NBDError


class TLSParameters(NamedTuple):
    """What a client needs for TLS, by libnbd's names for them."""

    certificates: str = ""  # a directory: ca-cert.pem, and client-cert.pem and client-key.pem where there are any
    verify_peer: bool = True  # the server's certificate, for its name
    psk_file: str = ""  # lines USERNAME:HEXKEY
    username: str = ""  # in that file
    hostname: str = ""  # that the certificate is for, if not the URI's


class URI(NamedTuple):
    """Where an export is: on a Unix socket if `socket` is set, on vsock if `cid` is, else at `host`; "" is the default.

    cid  the machine's vsock address
    tls  connections use TLS
    """

    export: str = ""
    socket: str = ""
    host: str = ""
    port: int = NBD_PORT
    cid: int | None = None
    tls: bool = False
    tls_parameters: TLSParameters = TLSParameters()  # not printed: they are the client's alone

    def __str__(self) -> str:
        name = quote(self.export, safe="")
        scheme = "nbds" if self.tls else "nbd"
        if self.socket:
            return f"{scheme}+unix:///{name}?socket={quote(self.socket, safe='/')}"
        port = "" if self.port == NBD_PORT else f":{self.port}"
        if self.cid is not None:
            return f"{scheme}+vsock://{self.cid}{port}/{name}"
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else self.host
        return f"{scheme}://{host}{port}/{name}"


def parse(text: str) -> URI:
    """The export that a URI names. NBDError for what is no URI of these: nbd, nbd+unix, nbd+vsock, and nbds for TLS."""
    try:
        parts = urlsplit(text)
        port = NBD_PORT if parts.port is None else parts.port
        # One slash parts the name from what is before; further ones belong to the name.
        export = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError as error:
        raise NBDError(f"{text}: not an NBD URI: {error}") from error
    tls = parts.scheme.startswith("nbds")
    scheme = parts.scheme.replace("nbds", "nbd", 1)
    query = parse_qs(parts.query)
    parameters = _tls_parameters(text, query) if tls else TLSParameters()
    if scheme == "nbd" and parts.hostname:
        return URI(export, host=unquote(parts.hostname), port=port, tls=tls, tls_parameters=parameters)
    if scheme == "nbd+vsock" and parts.hostname and parts.hostname.isascii() and parts.hostname.isdigit():
        return URI(export, cid=int(parts.hostname), port=port, tls=tls, tls_parameters=parameters)
    if scheme == "nbd+unix":
        paths = query.get("socket", [])
        if len(paths) == 1:
            return URI(export, socket=paths[0], tls=tls, tls_parameters=parameters)
        raise NBDError(f"{text}: a {parts.scheme} URI names its socket once: {parts.scheme}:///EXPORT?socket=PATH")
    raise NBDError(f"{text}: not a URI of the form nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")


def _tls_parameters(text: str, query: dict[str, list[str]]) -> TLSParameters:
    verify = query.get("tls-verify-peer", ["true"])[-1]
    if verify not in ("true", "false", "1", "0"):
        raise NBDError(f"{text}: tls-verify-peer is true or false")

    def last(name: str) -> str:
        return query.get(name, [""])[-1]

    return TLSParameters(
        last("tls-certificates"),
        verify in ("true", "1"),
        last("tls-psk-file"),
        last("tls-username"),
        last("tls-hostname"),
    )
