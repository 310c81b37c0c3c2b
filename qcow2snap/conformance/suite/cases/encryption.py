"""Encrypted images, for which the reader is given no key: to read the bytes as they are stored would be wrong."""

from __future__ import annotations

from formats import luks
from formats import qcow2 as layout
from formats.qcow2 import CryptMethod, HeaderExtensionType
from qcow2snap.conformance.suite.builder import KIB, Image
from qcow2snap.conformance.suite.content import noise
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section

NO_KEY = "without a key, what the guest would read is not known"


@case("refuse-encrypted-aes", "an image encrypted with AES, and no key", Section.ENCRYPTION)
def refuse_encrypted_aes(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.fields["crypt_method"] = CryptMethod.AES
    image.active.data(0, noise(1, 4096)).data(3, noise(2, 4096))
    return image.refuse(NO_KEY)


@case(
    "refuse-encrypted-luks", "an image encrypted with LUKS, and no key", Section.ENCRYPTION_POINTER, Section.ENCRYPTION
)
def refuse_encrypted_luks(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.fields["crypt_method"] = CryptMethod.LUKS
    # A LUKS1 header without any key slot in use: nothing opens it.
    slot = {"active": luks.KEY_SLOT_DISABLED, "iterations": 0, "salt": bytes(32)}
    header = luks.PartitionHeader.build(
        {
            "version": 1,
            "cipher-name": b"aes".ljust(32, b"\0"),
            "cipher-mode": b"xts-plain64".ljust(32, b"\0"),
            "hash-spec": b"sha256".ljust(32, b"\0"),
            "payload-offset": 4096,
            "key-bytes": 64,
            "mk-digest": noise(3, 20),
            "mk-digest-salt": noise(4, 32),
            "mk-digest-iter": 1000,
            "uuid": b"00000000-0000-4000-8000-000000000000".ljust(40, b"\0"),
            "key-slots": [slot | {"key-material-offset": 8, "stripes": 4000}] * 8,
        }
    )
    offset = image.metadata(header.ljust(64 * KIB, b"\0"), "LUKS header")
    pointer = layout.FullDiskEncryptionExtension.build({"offset": offset, "length": 64 * KIB})
    image.extension(HeaderExtensionType.FULL_DISK_ENCRYPTION, pointer)
    image.active.data(0, noise(1, 4096)).data(3, noise(2, 4096))
    return image.refuse(NO_KEY)
