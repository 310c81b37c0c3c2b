"""BlockdevOptions: which options each driver takes (QEMU qapi/block-core.json). Says what is sound, and opens nothing.

Options that only tune QEMU (aio, cache sizes, ...) are accepted and do nothing here; what would change what is read or
written, and is not built, is not in the schema, and so is refused by name.
"""

from __future__ import annotations

import json
from typing import Any

from qcow2snap.block.blockdev.keyval import parse_keyval
from qcow2snap.block.blockdev.qapi import (
    Alternate,
    Boolean,
    Enum,
    Integer,
    Later,
    Size,
    String,
    Struct,
    Type,
    Union,
    optional,
)
from qcow2snap.block.node import InvalidOption

UINT32 = (1 << 32) - 1


def _blockdev_options() -> Type:
    return BLOCKDEV_OPTIONS


_REFERENCE = Alternate("BlockdevRef", string=String(), obj=Later(_blockdev_options))
_REFERENCE_OR_NULL = Alternate("BlockdevRefOrNull", string=String(), obj=Later(_blockdev_options), null=True)

SOCKET_ADDRESS = Union(
    {},
    "type",
    {
        "unix": Struct({"path": String(), **optional(abstract=Boolean(), tight=Boolean())}),
        "inet": Struct(
            {
                "host": String(),
                "port": String(),
                **optional(numeric=Boolean(), ipv4=Boolean(), ipv6=Boolean(), keep_alive=Boolean()),
            }
        ),
        "vsock": Struct({"cid": String(), "port": String()}),
        "fd": Struct({"str": String()}),
    },
)

_COMMON: dict[str, Type] = optional(
    node_name=String(),
    discard=Enum("ignore", "unmap"),
    cache=Struct(optional(direct=Boolean(), no_flush=Boolean())),
    read_only=Boolean(),
    auto_read_only=Boolean(),
    force_share=Boolean(),
    detect_zeroes=Enum("off", "on", "unmap"),
    active=Boolean(),
)

_FILE = Struct(
    {
        "filename": String(),
        **optional(
            pr_manager=String(),
            locking=Enum("auto", "on", "off"),
            aio=Enum("threads", "native", "io_uring"),
            aio_max_batch=Integer(),
            drop_cache=Boolean(),
        ),
    }
)

_DRIVERS = {
    "file": _FILE,
    "host_device": _FILE,
    "raw": Struct({"file": _REFERENCE, **optional(offset=Integer(), size=Integer())}),
    "qcow2": Struct(
        {
            "file": _REFERENCE,
            **optional(
                backing=_REFERENCE_OR_NULL,
                data_file=_REFERENCE,
                lazy_refcounts=Boolean(),
                pass_discard_request=Boolean(),
                pass_discard_snapshot=Boolean(),
                pass_discard_other=Boolean(),
                discard_no_unref=Boolean(),
                overlap_check=Enum("none", "constant", "cached", "all"),
                cache_size=Integer(0),
                l2_cache_size=Integer(0),
                l2_cache_entry_size=Integer(0),
                refcount_cache_size=Integer(0),
                cache_clean_interval=Integer(0),
            ),
        }
    ),
    "nbd": Struct(
        {
            "server": SOCKET_ADDRESS,
            **optional(
                export=String(),
                tls_creds=String(),
                tls_hostname=String(),
                reconnect_delay=Integer(0, UINT32),
                open_timeout=Integer(0, UINT32),
            ),
        }
    ),
    "copy-before-write": Struct(
        {
            "file": _REFERENCE,
            "target": _REFERENCE,
            **optional(
                bitmap=Struct({"node": String(), "name": String()}),
                on_cbw_error=Enum("break-guest-write", "break-snapshot"),
                cbw_timeout=Integer(0, UINT32),
                min_cluster_size=Size(),
            ),
        }
    ),
    "snapshot-access": Struct({"file": _REFERENCE, **optional(snapshot=String())}),
    "null-co": Struct(optional(size=Integer(), latency_ns=Integer(0), read_zeroes=Boolean())),
}

BLOCKDEV_OPTIONS: Union = Union(_COMMON, "driver", _DRIVERS)


def parse_argument(text: str, kind: Type, implied: str | None = None) -> Any:
    """The argument of an option of the command line: JSON if it begins with a brace, else keyval."""
    if not text.startswith("{"):
        return kind.read(parse_keyval(text, implied), "", strings=True)
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidOption(f"JSON parse error, {error}") from None
    return kind.read(options, "", strings=False)
