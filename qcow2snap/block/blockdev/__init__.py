"""Named nodes, made from blockdev options and changed at run time (QEMU blockdev.c). `named_nodes` is the graph."""
