"""An NBD client: small and synchronous, with many requests in flight where that is asked for. It trusts no server.

    with Client.connect("nbd://localhost/monday") as client:
        client.go("monday")
        client.pread(0, 4096)

`python -m qcow2snap.nbd.client URI OUT` copies an export. The parts: `negotiation` and `transmission` are the protocol,
and know no socket; `connection` has the socket; `copy` uses them.
"""

from qcow2snap.nbd.client.connection import ALLOCATION, Client
from qcow2snap.nbd.client.negotiation import ExportInfo, ListedExport
from qcow2snap.nbd.client.replies import ReplyError
from qcow2snap.nbd.client.transmission import Reply, Request

__all__ = ["ALLOCATION", "Client", "ExportInfo", "ListedExport", "Reply", "ReplyError", "Request"]
