"""Hostile inputs: what reads foreign bytes gives a value or an error of :mod:`manifests.errors`, no more.

    python -m tests.fuzz [--inputs 10000] [--target NAME …] [--json FILE]

A target is a reader and some valid files. Its inputs are those files with pieces changed, cut, doubled and
swapped, with words put in that mean something to the format, and with checksums made right again, so that
damage gets past them. The same properties run with hypothesis in the suite (``tests/test_fuzz.py``). Where
atheris is installed (the extra ``fuzz``), a quarter of the inputs here are chosen by coverage.

A fault is any other exception, an input that takes longer than ``SECONDS``, more memory than ``MEMORY``, a
process that dies, and, seen by an audit hook of the interpreter, whatever reading must not do: start a
program, unpickle a class, connect to a host, read or write outside the input's folder.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manifests.errors import FlawsmithError
from tests.fuzz_mutations import mutated

NAMES = ("config", "tables", "tars", "pictures", "masks", "lists", "prompts", "names", "report")
INPUTS = 10_000
SECONDS = 10.0  # of processor time, the longest that one input may take
PATIENCE = 120.0  # seconds by the clock, for what waits and never goes on
MEMORY = 6 * 2**30  # bytes of address space that a target's process may have
MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = [
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "urllib.Request",
    "ftplib.connect",
    "os.putenv",
    "os.kill",
]
CHANGING = [
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
    "shutil.move",
]
# What the interpreter and its packages read of themselves.
OWN = (sys.prefix, sys.base_prefix, str(ROOT), "/usr", "/proc/", "/sys/", "/dev/", "/etc/mime.types")


class Forbidden(BaseException):
    """A reader did what no input may make it do. No handler of ``Exception`` can hide it."""


class TooSlow(BaseException):
    pass


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        check: ``check(data, folder)``; reads ``data`` in the empty ``folder``, raises
            :class:`FlawsmithError` where it refuses it, and asserts what must hold of what was read.
        seeds: valid inputs, of every kind that is read.
        words: pieces that mean something to the format.
        at_once: inputs that one call takes, joined by line feeds.
        reads_anywhere: the input may rightly name files outside its folder.
    """

    check: Callable[[bytes, Path], None]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[bytes]
    at_once: int = 1
    reads_anywhere: bool = False


# -- one input ------------------------------------------------------------------------------------------

_watched: tuple[str, bool] | None = None  # the folder, and whether files elsewhere may be read
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    folder, reads_anywhere = _watched
    if event in FORBIDDEN:
        raise Forbidden(f"{event} {arguments!r:.200}")
    if event in CHANGING:
        paths = [os.fsdecode(path) for path in arguments if isinstance(path, (str, bytes, os.PathLike))]
        if not all(_inside(path, (folder,)) for path in paths):
            raise Forbidden(f"{event} {arguments!r:.200}")
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull:
            allowed = _inside(path, (folder,))
        else:
            allowed = reads_anywhere or _inside(path, (folder, *OWN))
        if not allowed:
            raise Forbidden(f"open {path!r} with flags {flags:o}")


def _inside(path: str, folders: Sequence[str]) -> bool:
    whole = os.path.normpath(os.path.join(os.getcwd(), path))
    return any(whole.startswith(folder) for folder in folders)


@contextmanager
def watched(folder: Path, reads_anywhere: bool = False) -> Iterator[None]:
    """What happens inside is stopped where it is forbidden, or takes longer than ``SECONDS``."""
    global _watched, _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True

    def too_slow(*_: Any) -> None:
        raise TooSlow(f"longer than {SECONDS:g} s of processor time or {PATIENCE:g} s in all")

    alarmed = threading.current_thread() is threading.main_thread()
    if alarmed:
        before = [signal.signal(number, too_slow) for number in (signal.SIGPROF, signal.SIGALRM)]
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    _watched = (str(folder), reads_anywhere)
    try:
        yield
    finally:
        _watched = None
        if alarmed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGPROF, before[0])
            signal.signal(signal.SIGALRM, before[1])


def is_read(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the input was read (else: refused with a named cause); every other way out is raised."""
    remove(folder, but_itself=True)
    with watched(folder, target.reads_anywhere):
        try:
            target.check(data, folder)
        except FlawsmithError as error:
            assert str(error).strip(), "an error without a message"
            return False
    return True


def remove(path: Path, but_itself: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        if not but_itself:
            path.rmdir()
    else:
        path.unlink()


# -- many inputs ----------------------------------------------------------------------------------------


@dataclass
class Tally:
    inputs: int = 0
    read: int = 0
    slowest: float = 0.0


def run_target(name: str, inputs: int, seed: int, keep: Path, guided: bool) -> dict[str, Any]:
    """Gives ``inputs`` inputs to one target in this process; faults are kept as files, one of a kind."""
    if guided:
        import atheris

        with atheris.instrument_imports(
            include=["manifests", "generation.cut", "workflows", "tarfile", "webdataset", "yaml", "PIL"],
            enable_loader_override=False,
        ):
            from tests.fuzz_targets import TARGETS
    else:
        from tests.fuzz_targets import TARGETS

    target = TARGETS[name]
    seeds = target.seeds()
    tally, faults = Tally(), {}
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY_DISK))
    running = _running(name)

    def give(data: bytes) -> None:
        running.write_bytes(data)
        begun = time.perf_counter()
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)  # where no signal is let through
        try:
            tally.read += target.at_once * is_read(target, data, folder)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = (
                f"{type(error).__name__} at {frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
            )
            if where not in faults:
                text = "".join(traceback.format_exception(error))
                kept = keep / f"{name}-{len(faults)}"
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text(text[-20_000:], errors="replace")
                faults[where] = f"{where}: {str(error)[:200]}"
        faulthandler.cancel_dump_traceback_later()
        tally.inputs += target.at_once
        tally.slowest = max(tally.slowest, time.perf_counter() - begun)

    def result() -> dict[str, Any]:
        running.unlink(missing_ok=True)
        remove(folder)
        seconds = time.perf_counter() - started
        return {"target": name, **vars(tally), "seconds": seconds, "faults": list(faults.values())}

    chance = random.Random(f"{seed} {name}")
    for data in seeds:
        give(data)
    blind = inputs * 3 // 4 if guided else inputs
    while tally.inputs < blind:
        give(b"\n".join(mutated(chance, seeds, target.words) for _ in range(target.at_once)))
    if not guided:
        return result()

    def mutate(data: bytes, size: int, number: int) -> bytes:
        if number % 2:
            return atheris.Mutate(data, size)
        return mutated(random.Random(number), [data, *seeds], target.words)[:size]

    def one(data: bytes) -> None:
        give(data)
        if tally.inputs >= inputs:
            print(json.dumps(result()), flush=True)
            os._exit(0)  # libFuzzer has no other end but its own

    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for at, data in enumerate(seeds):
        (corpus / str(at)).write_bytes(data)
    longest = max(map(len, seeds))
    options = [
        f"-seed={seed + 1}",
        f"-max_len={2 * longest}",
        "-rss_limit_mb=0",
        "-timeout=300",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("unreachable")


def _running(name: str) -> Path:
    """The input that a target is given at the moment; after its process died, what it died of."""
    return Path(MEMORY_DISK) / f"flawsmith-fuzz-{name}"


def run_apart(name: str, inputs: int, seed: int, keep: Path, guided: bool) -> dict[str, Any]:
    """:func:`run_target` in a process of its own, whose death is a fault too."""
    command = [sys.executable, "-m", "tests.fuzz", "--alone", name, "--inputs", str(inputs)]
    command += ["--seed", str(seed), "--keep", str(keep), *([] if guided else ["--unguided"])]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"target"')]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    (keep / f"{name}.stderr").write_text(done.stderr)
    if _running(name).exists():
        (keep / f"{name}-died").write_bytes(_running(name).read_bytes())
    fault = f"the process ended with {done.returncode}: {last[:300]}"
    return {"target": name, **vars(Tally()), "seconds": 0.0, "faults": [fault]}


def show(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title="hostile inputs")
    for column in ("target", "inputs", "read", "refused", "faults", "seconds", "slowest"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for row in results:
        table.add_row(
            row["target"],
            f"{row['inputs']:,}",
            f"{row['read']:,}",
            f"{row['inputs'] - row['read']:,}",
            str(len(row["faults"])),
            f"{row['seconds']:.0f}",
            f"{1000 * row['slowest']:.0f} ms",
        )
    console = Console(width=max(Console().width, 100))
    console.print(table)
    for row in results:
        for fault in row["faults"]:
            console.print(f"{row['target']}: {fault}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=INPUTS, help="a target (default %(default)s)")
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unguided", action="store_true", help="without atheris")
    parser.add_argument("--keep", type=Path, help="folder for inputs that gave a fault")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--alone", choices=NAMES, help="one target in this process, as JSON")
    arguments = parser.parse_args()
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="flawsmith-fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    guided = not arguments.unguided and _has_atheris()
    if arguments.alone:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        print(json.dumps(run_target(arguments.alone, arguments.inputs, arguments.seed, keep, guided)))
        return 0
    if not guided:
        print("without atheris (pip install 'flawsmith[fuzz]'): no input is chosen by coverage")
    results = []
    for name in arguments.target or NAMES:
        results.append(run_apart(name, arguments.inputs, arguments.seed, keep, guided))
        print(f"{name}: {results[-1]['inputs']:,} inputs, {len(results[-1]['faults'])} faults", flush=True)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    faults = sum(len(row["faults"]) for row in results)
    if faults:
        print(f"{faults} faults; their inputs are in {keep}")
    return 1 if faults else 0


def _has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
