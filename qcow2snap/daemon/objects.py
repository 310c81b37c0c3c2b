"""Objects that others refer to by id: TLS credentials and secrets (qemu-storage-daemon's --object)."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2snap.block.blockdev.qapi import Boolean, Enum, Integer, String, Struct, Union, optional
from qcow2snap.block.node import FileError, InvalidOption, UnsupportedFeature
from qcow2snap.nbd.uri import TLSParameters

if TYPE_CHECKING:
    from qcow2snap.nbd.connection import Secure

_ENDPOINT = Enum("server", "client")
_CREDENTIALS = optional(dir=String(), endpoint=_ENDPOINT, verify_peer=Boolean(), priority=String())

OBJECT_OPTIONS = Union(
    {"id": String()},
    "qom-type",
    {
        "tls-creds-x509": Struct(_CREDENTIALS | optional(passwordid=String(), sanity_check=Boolean())),
        "tls-creds-psk": Struct(_CREDENTIALS | optional(username=String())),
        "secret": Struct(optional(data=String(), file=String(), format=Enum("raw", "base64"))),
        "iothread": Struct(optional(poll_max_ns=Integer(0), poll_grow=Integer(0), poll_shrink=Integer(0))),
    },
)

PSK_FILE = "keys.psk"  # in a directory of tls-creds-psk


class TLSCredentials(NamedTuple):
    """What an object of the type tls-creds-* says."""

    options: Mapping[str, Any]

    @property
    def is_server(self) -> bool:
        return bool(self.options.get("endpoint", "client") == "server")

    def read(self) -> Secure:
        """What makes a server's connections secure. FileError if there is nothing to read."""
        from qcow2snap.nbd.tls import Credentials

        directory = self.options.get("dir", "")
        if self.options["qom-type"] == "tls-creds-psk":
            return Credentials(psk_file=os.path.join(directory, PSK_FILE)).read()
        return Credentials(directory, self.options.get("verify-peer", True)).read()

    def parameters(self, hostname: str) -> TLSParameters:
        """What a client of another server needs."""
        directory = self.options.get("dir", "")
        if self.options["qom-type"] == "tls-creds-psk":
            return TLSParameters(
                psk_file=os.path.join(directory, PSK_FILE), username=self.options.get("username", "qemu")
            )
        return TLSParameters(directory, self.options.get("verify-peer", True), hostname=hostname)


class Objects:
    """All of them, by id. In use are those that a server or a node was made with; that is theirs to say."""

    def __init__(self) -> None:
        self._objects: dict[str, object] = {}

    def add(self, options: Mapping[str, Any]) -> None:
        name = options["id"]
        if name in self._objects:
            raise InvalidOption(f"attempt to add duplicate property '{name}' to object (type 'container')")
        self._objects[name] = _MAKERS[options["qom-type"]](options)

    def remove(self, name: str) -> None:
        if name not in self._objects:
            raise InvalidOption(f"object '{name}' not found")
        del self._objects[name]

    def credentials(self, name: str, *, server: bool) -> TLSCredentials:
        found = self._objects.get(name)
        if found is None:
            raise InvalidOption(f"No TLS credentials with id '{name}'")
        if not isinstance(found, TLSCredentials):
            raise InvalidOption(f"Object with id '{name}' is not TLS credentials")
        if found.is_server != server:
            raise InvalidOption(f"Expecting TLS credentials with a {'server' if server else 'client'} endpoint")
        return found


def _credentials(options: Mapping[str, Any]) -> TLSCredentials:
    made = TLSCredentials(options)
    if options.get("passwordid"):
        raise UnsupportedFeature("keys with a passphrase are not read: give one without")
    if made.is_server:
        made.read()  # what is wrong is to be said now, and not to the first client
    elif not os.path.isdir(options.get("dir", "")):
        raise FileError(f"Unable to access credentials {options.get('dir', '')}: no such directory")
    return made


def _secret(options: Mapping[str, Any]) -> bytes:
    if ("data" in options) == ("file" in options):
        raise InvalidOption("Must provide 'file' or 'data', and not both")
    try:
        raw = options["data"].encode() if "data" in options else _content(options["file"])
        return base64.b64decode(raw, validate=True) if options.get("format") == "base64" else raw
    except ValueError as error:
        raise InvalidOption(f"Unable to decode base64: {error}") from None


def _content(filename: str) -> bytes:
    try:
        with open(filename, "rb") as file:
            return file.read(1 << 16)
    except OSError as error:
        raise FileError(f"Unable to read {filename}: {error.strerror}") from None


_MAKERS: dict[str, Callable[[Mapping[str, Any]], object]] = {
    "tls-creds-x509": _credentials,
    "tls-creds-psk": _credentials,
    "secret": _secret,
    "iothread": lambda options: None,  # threads are not bound to nodes here: nothing to do
}
