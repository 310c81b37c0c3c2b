"""A storage daemon: a graph of named nodes, exports of them, QMP to change both (qemu-storage-daemon's interface)."""
