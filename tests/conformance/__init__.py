"""What qcow2snap says of an image's conformance against what QEMU says of it."""
