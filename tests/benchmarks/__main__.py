"""`make bench`: all benchmarks, or those that are named, and a table of their figures."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys

from tests.benchmarks import extract, mapping, pairs, startup

TOPICS = {"extract": extract, "map": mapping, "list": startup}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description="Ratios of medians against the peer.")
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"any of: {', '.join(TOPICS)}")
    parser.add_argument("--quick", action="store_true", help="smaller images, fewer runs: to see that it works")
    arguments = parser.parse_args()
    if unknown := set(arguments.topics) - set(TOPICS):
        parser.error(f"no such topic: {', '.join(sorted(unknown))}")

    qemu = subprocess.run(["qemu-img", "--version"], check=True, capture_output=True, text=True).stdout.split()[2]
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}, ", end="")
    print(f"Python {platform.python_version()}, QEMU {qemu}", flush=True)
    print(pairs.HEADING, flush=True)
    try:
        for topic in arguments.topics or TOPICS:
            for comparison in TOPICS[topic].comparisons(arguments.quick):
                # The targets are set for images of full size.
                print(comparison._replace(target="", met=True) if arguments.quick else comparison, flush=True)
    except pairs.BenchmarkError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
