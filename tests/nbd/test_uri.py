"""NBD URIs: what we print is what we and libnbd understand."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap.block.node import NBDError
from qcow2snap.nbd import uri as nbd_uri
from qcow2snap.nbd.uri import URI, TLSParameters
from tests.nbd.support import Serve, ZeroNode, exports

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXT, TEXT.filter(bool), st.integers(0, 65535))
def test_a_uri_that_is_printed_is_the_one_that_is_parsed(export: str, path: str, port: int) -> None:
    places = (
        {"socket": path},
        {"host": "127.0.0.1", "port": port},
        {"host": "::1", "port": port},
        {"cid": 2, "port": port},
    )
    for uri in (URI(export, **place, tls=tls) for place in places for tls in (False, True)):  # type: ignore[arg-type]
        assert nbd_uri.parse(str(uri)) == uri
        assert str(uri).isascii()


@pytest.mark.parametrize(
    "text",
    ["", "nbd://", "nbd:///x", "http://h/x", "nbds:///x", "nbd+unix:///x", "nbds+unix:///x",
     "nbd+vsock://x/", "nbdss://h/x", "nbds://h/x?tls-verify-peer=maybe", "nbd+unix:///?socket=a&socket=b",
     "nbd://h:x/", "nbd://[::1/", "nbd://h/%ff", "nbd+unix:///?socket=", "/path"],
)  # fmt: skip
def test_what_is_no_uri_of_ours_is_one_error(text: str) -> None:
    with pytest.raises(NBDError):
        nbd_uri.parse(text)


def test_tls_has_libnbds_parameters() -> None:
    uri = nbd_uri.parse("nbds://h:1/x?tls-certificates=/a%20b&tls-verify-peer=false&tls-psk-file=k&tls-username=u")
    assert uri == URI("x", host="h", port=1, tls=True, tls_parameters=uri.tls_parameters)
    assert uri.tls_parameters == ("/a b", False, "k", "u", "")
    assert nbd_uri.parse("nbds+unix:///?socket=s").tls_parameters == TLSParameters()


def test_nbdinfo_understands_our_uris(serve: Serve) -> None:
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    name = '100% ä/?#&= "x"+y'
    where = serve(exports(**{name: ZeroNode(77)})).listeners[0].uri._replace(export=name)
    assert subprocess.check_output(["nbdinfo", "--size", str(where)], text=True).strip() == "77"
