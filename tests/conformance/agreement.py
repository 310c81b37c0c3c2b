"""Our check against QEMU's: python -m tests.conformance.agreement [--seed N --count M] [--qemu-img FILE].

Shows what is not explained by disagreements.py. Without a seed, and with the qemu-img that is installed, it then writes
disagreements.tsv and docs/agreement.md anew.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fixtures import corpus
from fixtures.corpus import Specimen
from tests.conformance.disagreements import REASONS
from tests.conformance.verdict import Verdict, by_qemu, by_us
from tests.support import qemu_img
from tests.support.tools import REPOSITORY

TABLE = Path(__file__).with_name("disagreements.tsv")
DOCUMENT = REPOSITORY / "docs" / "agreement.md"
BATCH = 64  # images that lie in the directory at the same time


class Disagreement(NamedTuple):
    """An image of which the two do not say the same, and the keys of the reasons why; none: it is not explained."""

    name: str
    qemu: str
    ours: str
    reasons: tuple[str, ...]


def compare(specimens: Iterable[Specimen], directory: Path, program: str | None = None) -> Iterator[Disagreement]:
    """Check all of them twice. QEMU runs in threads, beside us."""
    corpus.lay_out(directory)
    remaining = iter(specimens)
    with ThreadPoolExecutor(2) as pool:
        while batch := list(itertools.islice(remaining, BATCH)):
            paths = [specimen.write(directory) for specimen in batch]
            theirs = pool.map(lambda path: by_qemu(path, program), paths)
            for specimen, path, qemu in zip(batch, paths, theirs, strict=True):
                ours = by_us(path)
                path.unlink()
                if not ours.is_same(qemu, counted=specimen.faults <= 1):
                    reasons = explain(qemu, ours, counted=specimen.faults <= 1)
                    yield Disagreement(specimen.name, str(qemu), str(ours), reasons)


def explain(qemu: Verdict, ours: Verdict, *, counted: bool) -> tuple[str, ...]:
    """Why both are right, each from where it stands: the fewest reasons that lead from our verdict to QEMU's."""
    for reason in REASONS.values():
        if reason.qemu and qemu.state == "stops" and re.search(reason.qemu, qemu.said):
            return (reason.key,)
        if reason.ends and qemu.state != "stops" and ours.found.keys() <= {(rule, True) for rule in reason.rules}:
            return (reason.key,)
    found = {rule for rule, _ in ours.found}
    at_hand = [reason for reason in REASONS.values() if reason.rules & found]
    for number in range(1, len(at_hand) + 1):
        for chosen in itertools.combinations(at_hand, number):
            rules = frozenset().union(*(reason.rules for reason in chosen))
            if ours.without(rules).is_same(qemu, counted=counted):
                return tuple(reason.key for reason in chosen)
    return ()


def table() -> list[Disagreement]:
    """The disagreements that are known and explained."""
    rows = (line.split("\t") for line in TABLE.read_text().splitlines())
    return [Disagreement(name, qemu, ours, tuple(reasons.split())) for name, qemu, ours, reasons in rows]


def render(disagreements: Iterable[Disagreement], number: int, version: str) -> str:
    """docs/agreement.md."""
    lines = [HEADING.format(number=number, version=version)]
    rows = sorted(disagreements)
    for reason in REASONS.values():
        concerned = [row for row in rows if reason.key in row.reasons]
        lines += [
            f"## {reason.key}",
            "",
            reason.about,
            "",
            f"> {reason.sentence}",
            ">",
            f"> Section “{reason.section}”",
            "",
        ]
        lines += ["| image | `qemu-img check` | `qcow2snap check` |", "| --- | --- | --- |"]
        lines += [f"| `{row.name}` | {row.qemu} | {row.ours} |" for row in concerned]
        lines.append("")
    return "\n".join(lines)


HEADING = """# Where `qcow2snap check` and `qemu-img check` do not agree

Both checked the {number} images of the corpus (`fixtures/corpus.py`): sound ones, each field of each structure at its
boundaries, references to metadata, beyond the end and off the grid, refcounts one off, cut files, single bits. Where
QEMU ({version}) opens an image, so do we; where it finds corruptions, leaks or nothing, so do we, and where one
fault was made, as many; but for the images below. "stops" means that the image cannot be opened, or not be checked to
its end. This page is written by `python -m tests.conformance.agreement`; a test fails if a disagreement is not on it,
or is on it and gone.
"""


def qemu_version() -> str:
    return qemu_img("--version").stdout.splitlines()[0].removeprefix("qemu-img version ").split(" ")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare our check with QEMU's.")
    parser.add_argument("--seed", type=int, help="random faults, of this seed, instead of the corpus")
    parser.add_argument("--count", type=int, default=1000, help="how many images with random faults")
    parser.add_argument("--qemu-img", help="another qemu-img")
    arguments = parser.parse_args()
    is_corpus = arguments.seed is None
    chosen = list(corpus.specimens() if is_corpus else corpus.random_specimens(arguments.seed, arguments.count))
    with tempfile.TemporaryDirectory() as directory:
        found = list(compare(chosen, Path(directory), arguments.qemu_img))
    unexplained = [each for each in found if not each.reasons]
    for each in unexplained:
        print(f"{each.name}: QEMU {each.qemu}, we {each.ours}")
    print(f"{len(chosen)} images, {len(found)} disagreements, {len(unexplained)} of them not explained")
    if is_corpus and arguments.qemu_img is None and not unexplained:
        rows = ("\t".join((each.name, each.qemu, each.ours, " ".join(each.reasons))) for each in sorted(found))
        TABLE.write_text("".join(f"{row}\n" for row in rows))
        DOCUMENT.write_text(render(found, len(chosen), qemu_version()))


if __name__ == "__main__":
    main()
