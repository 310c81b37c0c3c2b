"""NBD on the wire: handshake, options, requests and replies, named as in the NBD protocol's doc/proto.md.

What the bytes mean, and the limits that the document sets; who may say what and when is not here. All integers are
big-endian. A string is UTF-8 of at most MAX_STRING bytes without NUL; layouts give its bytes, undecoded. What is marked
experimental is described on the document's branches, extension-ext-header and extension-resize.

construct parses what comes a few times a connection. A request and its reply come 100,000 times a second: their
layouts stand here twice, as construct declarations to read and as `struct.Struct`s to use. A test holds them equal.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct as Packed

from construct import (
    Array,
    Bytes,
    Check,
    Const,
    GreedyBytes,
    GreedyRange,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    Rebuild,
    Struct,
    Terminated,
    len_,
    this,
)

NBD_PORT = 10809  # assigned by IANA to newstyle negotiation

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
NBD_REP_MAGIC = 0x3E889045565A9
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC = 0x6E8A278C

MAX_STRING = 4096  # bytes of an export's name, a query, an error message ("Terms and conventions")
MAX_PAYLOAD = 1 << 25  # bytes of one read or write that every server must stand ("Size constraints")
MAX_STATUS_DESCRIPTORS = 1 << 20  # of one block status chunk
MAX_REQUEST_ITEMS = 1024  # information requests or queries in one option; ours, the document names none


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9  # experimental
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12  # experimental


class OptionType(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11  # experimental


class ReplyType(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


REPLY_IS_ERROR = 1 << 31  # every error among the reply types has this bit


class InfoType(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8  # experimental


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5  # experimental


class ReplyFlag(IntFlag):
    DONE = 1 << 0


class ReplyChunkType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6  # experimental
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


CHUNK_IS_ERROR = 1 << 15  # every error among the chunk types has this bit


class Errno(IntEnum):
    """NBD's own error values, which only happen to be those of Linux."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class State(IntFlag):
    """Flags of a descriptor in the metadata context base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1


# Handshake phase. What follows a header's length is the data that the option or reply type asks for.

String = Prefixed(Int32ub, GreedyBytes)

# fmt: off
Greeting = Struct(
    "init_passwd" / Const(NBDMAGIC),
    "cliserv_magic" / Const(IHAVEOPT),
    "handshake_flags" / Int16ub,         # HandshakeFlag
)

ClientFlags = Struct(
    "client_flags" / Int32ub,            # ClientFlag
)

OptionHeader = Struct(
    "magic" / Bytes(8),                  # IHAVEOPT
    "option" / Int32ub,                  # OptionType
    "length" / Int32ub,
)

OptionReplyHeader = Struct(
    "magic" / Int64ub,                   # NBD_REP_MAGIC
    "option" / Int32ub,                  # as sent by the client
    "reply_type" / Int32ub,              # ReplyType
    "length" / Int32ub,
)

ExportNameReply = Struct(                # to EXPORT_NAME; no header before it
    "size" / Int64ub,
    "transmission_flags" / Int16ub,      # TransmissionFlag
)
EXPORT_NAME_ZEROES = bytes(124)          # after it, unless NO_ZEROES was agreed on

InfoRequest = Struct(                    # data of INFO and GO
    "name" / String,
    "number_of_requests" / Int16ub,
    Check(this.number_of_requests <= MAX_REQUEST_ITEMS),
    "requests" / Array(this.number_of_requests, Int16ub),        # InfoType
    Terminated,
)

MetaContextRequest = Struct(             # data of LIST_META_CONTEXT and SET_META_CONTEXT
    "name" / String,
    "number_of_queries" / Int32ub,
    Check(this.number_of_queries <= MAX_REQUEST_ITEMS),
    "queries" / Array(this.number_of_queries, String),
    Terminated,
)

ServerReply = Struct(                    # data of ReplyType.SERVER
    "name" / String,
    "details" / GreedyBytes,             # for a human being
)

MetaContextReply = Struct(               # data of ReplyType.META_CONTEXT
    "context_id" / Int32ub,
    "name" / GreedyBytes,
)

# Data of ReplyType.INFO, after its 16 bits of information type.
InfoExport = Struct("information_type" / Const(InfoType.EXPORT, Int16ub), *ExportNameReply.subcons)
InfoName = Struct("information_type" / Const(InfoType.NAME, Int16ub), "name" / GreedyBytes)
InfoDescription = Struct("information_type" / Const(InfoType.DESCRIPTION, Int16ub), "description" / GreedyBytes)
InfoBlockSize = Struct(
    "information_type" / Const(InfoType.BLOCK_SIZE, Int16ub),
    "minimum_block_size" / Int32ub,      # a power of 2, 1 to 65,536
    "preferred_block_size" / Int32ub,    # a power of 2, 512 or more
    "maximum_payload_size" / Int32ub,
)

# Transmission phase.

Request = Struct(
    "magic" / Const(NBD_REQUEST_MAGIC, Int32ub),
    "command_flags" / Int16ub,           # CommandFlag
    "type" / Int16ub,                    # Command
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int32ub,
)                                        # then, for WRITE, `length` bytes

SimpleReply = Struct(
    "magic" / Const(NBD_SIMPLE_REPLY_MAGIC, Int32ub),
    "error" / Int32ub,                   # 0 or Errno
    "cookie" / Int64ub,
)                                        # then, for READ without error, the data

StructuredReplyChunk = Struct(
    "magic" / Const(NBD_STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,                   # ReplyFlag
    "type" / Int16ub,                    # ReplyChunkType
    "cookie" / Int64ub,
    "length" / Int32ub,                  # of the payload
)

# With extended headers there are no other requests than these, and no other replies.

ExtendedRequest = Struct(
    "magic" / Const(NBD_EXTENDED_REQUEST_MAGIC, Int32ub),
    "command_flags" / Int16ub,           # CommandFlag
    "type" / Int16ub,                    # Command
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,                  # of the payload with PAYLOAD_LEN, else of what the request has its effect on
)                                        # then, with PAYLOAD_LEN, `length` bytes

ExtendedReplyChunk = Struct(
    "magic" / Const(NBD_EXTENDED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,                   # ReplyFlag
    "type" / Int16ub,                    # ReplyChunkType
    "cookie" / Int64ub,
    "offset" / Int64ub,                  # of the request
    "length" / Int64ub,                  # of the payload
)

BlockStatusPayload = Struct(             # behind a BLOCK_STATUS request with PAYLOAD_LEN
    "effect_length" / Int64ub,
    "context_ids" / GreedyRange(Int32ub),
    Terminated,
)

# Payloads of chunks.

OffsetData = Struct("offset" / Int64ub, "data" / GreedyBytes)
OffsetHole = Struct("offset" / Int64ub, "hole_size" / Int32ub)
BlockStatus = Struct(
    "context_id" / Int32ub,
    "descriptors" / GreedyRange(Struct("length" / Int32ub, "status_flags" / Int32ub)),
)
BlockStatusExt = Struct(
    "context_id" / Int32ub,
    "descriptor_count" / Rebuild(Int32ub, len_(this.descriptors)),
    "descriptors" / Array(this.descriptor_count, Struct("length" / Int64ub, "status_flags" / Int64ub)),
    Terminated,
)
Error = Struct("error" / Int32ub, "message" / Prefixed(Int16ub, GreedyBytes))
ErrorOffset = Struct(*Error.subcons, "offset" / Int64ub)
# fmt: on

# The same for every request, unchecked: magic numbers are the first field.
REQUEST = Packed(">IHHQQI")
SIMPLE_REPLY = Packed(">IIQ")
STRUCTURED_REPLY_CHUNK = Packed(">IHHQI")
OFFSET_DATA_CHUNK = Packed(">IHHQIQ")  # a chunk's header, and its payload up to the data
OFFSET_HOLE_CHUNK = Packed(">IHHQIQI")  # a whole chunk
BLOCK_STATUS = Packed(">I")  # a chunk's payload up to the descriptors
DESCRIPTOR = Packed(">II")
EXTENDED_REQUEST = Packed(">IHHQQQ")
EXTENDED_REPLY_CHUNK = Packed(">IHHQQQ")
EXTENDED_OFFSET_DATA_CHUNK = Packed(">IHHQQQQ")
EXTENDED_OFFSET_HOLE_CHUNK = Packed(">IHHQQQQI")
BLOCK_STATUS_EXT = Packed(">II")
EXTENDED_DESCRIPTOR = Packed(">QQ")
