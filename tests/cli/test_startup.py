"""What is not needed is not loaded: a listing or `--help` answers before numpy would have been imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.support import start
from tests.support import Library
from tests.support.tools import REPOSITORY, TIME_LIMIT

HEAVY = {"numpy", "rich", "zstandard", "deflate", "crcmod", "asyncio", "ssl"}


def modules(*words: object) -> set[str]:
    """Top-level names of what Python has imported when a command ends."""
    program = "import sys\nfrom qcow2snap.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    "
    program += "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    return imported(program, *map(str, words))


def imported(program: str, *words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=TIME_LIMIT, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_importing_the_package_loads_next_to_nothing() -> None:
    program = "import sys, qcow2snap; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    assert imported(program) & (HEAVY | {"click", "construct"}) == set()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["list", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert modules(*words) & HEAVY == set()


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=" ".join)
def test_a_listing_loads_nothing_heavy(library: Library, flags: list[str]) -> None:
    assert modules("list", *flags, library.path("demo")) & HEAVY == set()


def test_a_diff_needs_no_numpy(library: Library) -> None:
    program = (
        "import sys\nfrom qcow2snap.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    "
    )
    program += "assert end.code == 1\nprint(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    assert imported(program, "diff", str(library.path("demo")), "monday", "tuesday") & HEAVY == set()


@pytest.mark.parametrize("words", [["map"], ["digest"], ["info"]], ids=" ".join)
def test_no_progress_bar_is_loaded_where_there_is_no_terminal(library: Library, words: list[str]) -> None:
    assert "rich" not in modules(*words, library.path("demo"))


@pytest.mark.parametrize("words", [["list"], ["map"], ["check"], ["create", "--force"]], ids=" ".join)
def test_no_command_loads_what_only_other_commands_use(library: Library, tmp_path: Path, words: list[str]) -> None:
    image = [tmp_path / "new.qcow2", "1G"] if words[0] == "create" else [library.path("demo")]
    others = HEAVY - {"numpy"} | {"decimal", "multiprocessing", "xml"}
    assert modules(*words, *image) & others == set()


@pytest.mark.parametrize("command", ["list", "check"])
def test_a_short_command_is_not_searched_for_garbage(library: Library, command: str) -> None:
    program = """if True:
        import atexit, gc, sys
        collections = lambda: sum(generation["collections"] for generation in gc.get_stats())
        frozen = lambda: print("frozen" if gc.get_freeze_count() else "searched", file=sys.stderr)
        atexit.register(frozen)  # before ours is registered, so that it is called after it
        from qcow2snap.cli import main
        before = collections()
        try:
            main(sys.argv[1:])
        finally:
            print(collections() - before, file=sys.stderr)
    """
    assert imported(program, command, str(library.path("demo"))) == {"0", "frozen"}


def test_python_m_and_the_script_are_the_same_program() -> None:
    process = start("--version")
    out, _ = process.communicate(timeout=TIME_LIMIT)
    assert out.startswith(b"qcow2snap, version ")
