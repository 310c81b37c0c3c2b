"""`python -m qcow2snap` is the command `qcow2snap`."""

from qcow2snap.cli import main

if __name__ == "__main__":
    main()
