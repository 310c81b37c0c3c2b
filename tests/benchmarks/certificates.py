"""X.509 certificates for a server on this machine, made by openssl under the names that QEMU and nbdkit expect."""

from __future__ import annotations

import subprocess
from pathlib import Path

_NEW = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
_AUTHORITY = ["-subj", "/CN=benchmarks", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"]
_SERVER = ["-subj", "/CN=localhost", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]
_SERVER += ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=DNS:localhost"]
_SERVER += ["-keyout", "server-key.pem", "-out", "server-cert.pem"]


def make(folder: Path) -> Path:
    """ca-cert.pem, server-cert.pem and server-key.pem in a new folder, which is given back."""
    folder.mkdir()
    for options in _AUTHORITY, _SERVER:
        subprocess.run([*_NEW, *options], cwd=folder, check=True, capture_output=True)
    return folder
