"""The LUKS1 partition header, as it stands at the start of the encryption header of a qcow2 image.

Section "LUKS partition header" (figure 1) of the LUKS On-Disk Format Specification 1.2.3. Names are that document's.
"""

from __future__ import annotations

from construct import Array, Bytes, Const, Int16ub, Int32ub, Struct

MAGIC = b"LUKS\xba\xbe"
SECTOR_SIZE = 512
KEY_SLOT_ENABLED = 0x00AC71F3
KEY_SLOT_DISABLED = 0x0000DEAD

# fmt: off
KeySlot = Struct(
    "active" / Int32ub,               # 0-3: KEY_SLOT_ENABLED or KEY_SLOT_DISABLED
    "iterations" / Int32ub,           # 4-7
    "salt" / Bytes(32),               # 8-39
    "key-material-offset" / Int32ub,  # 40-43: sectors
    "stripes" / Int32ub,              # 44-47
)

PartitionHeader = Struct(
    "magic" / Const(MAGIC),           # 0-5
    "version" / Int16ub,              # 6-7
    "cipher-name" / Bytes(32),        # 8-39: text, padded with zeros
    "cipher-mode" / Bytes(32),        # 40-71
    "hash-spec" / Bytes(32),          # 72-103
    "payload-offset" / Int32ub,       # 104-107: sectors
    "key-bytes" / Int32ub,            # 108-111
    "mk-digest" / Bytes(20),          # 112-131
    "mk-digest-salt" / Bytes(32),     # 132-163
    "mk-digest-iter" / Int32ub,       # 164-167
    "uuid" / Bytes(40),               # 168-207: text, padded with zeros
    "key-slots" / Array(8, KeySlot),  # 208-591
)
# fmt: on
