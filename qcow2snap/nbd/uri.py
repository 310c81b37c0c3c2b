"""NBD URIs, as the NBD project's doc/uri.md has them. Text only: nothing is connected or looked up."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from formats.nbd import NBD_PORT
from qcow2snap.block.node import NBDError


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
    """The export that a URI names. NBDError for any other URI, and for TLS and vsock, which are not spoken."""
    try:
        parts = urlsplit(text)
        port = NBD_PORT if parts.port is None else parts.port
        # One slash parts the name from what is before; further ones belong to the name.
        export = unquote(parts.path.removeprefix("/"), errors="strict")
    except ValueError as error:
        raise NBDError(f"{text}: not an NBD URI: {error}") from error
    if parts.scheme == "nbd" and parts.hostname:
        return URI(export, host=unquote(parts.hostname), port=port)
    if parts.scheme == "nbd+unix":
        paths = parse_qs(parts.query).get("socket", [])
        if len(paths) == 1:
            return URI(export, socket=paths[0])
        raise NBDError(f"{text}: a nbd+unix URI names its socket once: nbd+unix:///EXPORT?socket=PATH")
    raise NBDError(f"{text}: not a URI of the form nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")
