"""`make bench`: all benchmarks, or those that are named, and a table of their figures."""

from __future__ import annotations

import argparse
import compileall
import os
import platform
import subprocess
import sys

from tests.benchmarks import (
    check,
    diff,
    extract,
    extract_qcow2,
    fleece,
    mapping,
    nbd_many,
    nbd_read,
    pairs,
    snapshots,
    startup,
    writable,
    write,
)
from tests.support.tools import REPOSITORY

TOPICS = {
    "list": startup,
    "map": mapping,
    "nbd-read": nbd_read,
    "nbd-many": nbd_many,
    "check": check,
    "diff": diff,
    "extract": extract,
    "extract-qcow2": extract_qcow2,
    "writable": writable,
    "fleece": fleece,
    "write": write,
    "snapshots": snapshots,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Ratios of medians against the peer, above 1 we are better; 'of limit' is ours against what nbdkit "
        "reaches on the raw bytes; 'peak' is memory, of servers the summed PSS of all their processes.",
    )
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"any of: {', '.join(TOPICS)}")
    parser.add_argument("--only", metavar="TEXT", default="", help="only rows that have this in their name")
    parser.add_argument("--quick", action="store_true", help="smaller images, fewer runs: to see that it works")
    arguments = parser.parse_args()
    if unknown := set(arguments.topics) - set(TOPICS):
        parser.error(f"no such topic: {', '.join(sorted(unknown))}")

    for package in ("formats", "qcow2snap"):
        compileall.compile_dir(
            REPOSITORY / package, quiet=1
        )  # as pip does where it installs them, even if Python here may not

    qemu = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True, text=True).stdout.split()[2]
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}, ", end="")
    print(f"Python {platform.python_version()}, QEMU {qemu}", flush=True)
    print(pairs.HEADING, flush=True)
    try:
        for topic in arguments.topics or TOPICS:
            for row in TOPICS[topic].rows(arguments.quick):
                if arguments.only in row.what:
                    comparison = row.compare()
                    # The targets are set for images of full size.
                    print(comparison._replace(target=pairs.Target()) if arguments.quick else comparison, flush=True)
    except pairs.BenchmarkError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
