"""NBD URIs: what we print is what we and libnbd understand."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap.block.node import NBDError
from qcow2snap.nbd import uri as nbd_uri
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES
from qcow2snap.nbd.uri import URI
from tests.nbd.support import Serve, ZeroNode, exports
from tests.nbd.test_newer_peers import peers  # noqa: F401  # a fixture

FRAMINGS = [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXT, TEXT.filter(bool), st.integers(0, 65535))
def test_a_uri_that_is_printed_is_the_one_that_is_parsed(export: str, path: str, port: int) -> None:
    for uri in (URI(export, socket=path), URI(export, host="127.0.0.1", port=port), URI(export, host="::1", port=port)):
        assert nbd_uri.parse(str(uri)) == uri
        assert str(uri).isascii()


@pytest.mark.parametrize(
    "text",
    ["", "nbd://", "nbd:///x", "http://h/x", "nbds://h/x", "nbd+unix:///x", "nbd+unix:///?socket=a&socket=b",
     "nbd://h:x/", "nbd://[::1/", "nbd://h/%ff", "nbd+unix:///?socket=", "/path"],
)  # fmt: skip
def test_what_is_no_uri_of_ours_is_one_error(text: str) -> None:
    with pytest.raises(NBDError):
        nbd_uri.parse(text)


def test_nbdinfo_understands_our_uris(serve: Serve) -> None:
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    name = '100% ä/?#&= "x"+y'
    where = serve(exports(**{name: ZeroNode(77)})).listeners[0].uri._replace(export=name)
    assert subprocess.check_output(["nbdinfo", "--size", str(where)], text=True).strip() == "77"
