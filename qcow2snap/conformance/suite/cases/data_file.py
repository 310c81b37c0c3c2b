"""External data files: guest clusters lie in a file of their own, each at its guest offset."""

from __future__ import annotations

from qcow2snap.conformance.suite import deflate
from qcow2snap.conformance.suite.builder import KIB, Image
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.state import COPIED
from qcow2snap.conformance.suite.values import Section


@case("data-file", "an external data file; the first guest cluster is at offset 0 of it", Section.DATA_FILE)
def data_file(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file()
    image.active.data(0).data(1).data(7).data(15)
    return image


@case("data-file-not-mapped", "bytes of the data file that no L2 entry refers to: not the guest's", Section.DATA_FILE)
def data_file_not_mapped(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file()
    image.guest_file.put(0, b"not to be read.\n" * 4096)
    image.active.data(2).data(3)
    return image


@case("data-file-zero", "zero clusters, with and without a place in the data file", Section.DATA_FILE, Section.STANDARD)
def data_file_zero(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file()
    image.active.zero(0, allocated=True).zero(1).data(2).zero(3, allocated=True)
    return image


@case("data-file-raw", "a data file that is a raw image too", Section.DATA_FILE, Section.AUTOCLEAR)
def data_file_raw(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file(raw=True)
    for cluster in range(16):
        if cluster in (2, 3, 9):
            image.active.data(cluster)
        else:
            image.active.data(cluster, bytes(image.cluster_size))
    return image


@case("data-file-longer", "a data file that goes on behind the disk", Section.DATA_FILE)
def data_file_longer(name: str) -> Image:
    image = Image(name, 62 * KIB).with_data_file()
    image.active.data(0).data(15)
    image.guest_file.put(64 * KIB, b"not to be read.\n" * 1000)
    return image


@case("data-file-over-backing", "an external data file over a backing file", Section.DATA_FILE, Section.UNALLOCATED)
def data_file_over_backing(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file()
    image.over_raw(image.lines(64 * KIB)).active.data(1).zero(2)
    return image


@case("data-file-many-tables", "an external data file and several L2 tables", Section.DATA_FILE, Section.MAPPING)
def data_file_many_tables(name: str) -> Image:
    image = Image(name, 128 * KIB, cluster_bits=9).with_data_file()
    for cluster in (0, 1, 64, 130, 255):
        image.active.data(cluster)
    return image


@case("refuse-data-file-missing", "an external data file that does not exist", Section.DATA_FILE)
def refuse_data_file_missing(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file(missing=True)
    image.active.data(0).data(2)
    return image.refuse("the guest's data is not there")


@case("refuse-data-file-compressed", "a compressed cluster and an external data file", Section.DATA_FILE)
def refuse_data_file_compressed(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file()
    data = image.lines(image.cluster_size)
    image.active.data(0).compressed(2, deflate.fixed(deflate.tokens(data)), data)
    return image.refuse("with an external data file, there are no compressed clusters")


@case("refuse-data-file-offset", "an L2 entry of another offset than the guest's", Section.DATA_FILE)
def refuse_data_file_offset(name: str) -> Image:
    image = Image(name, 64 * KIB).with_data_file()
    image.active.data(0).data(3).entry(2, COPIED | 3 * image.cluster_size)
    return image.refuse("the offset must match the guest offset")
