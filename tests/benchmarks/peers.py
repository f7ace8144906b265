"""How a peer is measured: in an environment of its own, in a process of its own.

Peers pull in packages that collide with ours and with each other's (two builds of OpenCV, for one), so they
live in environments named by their extra: ``.venv-bench`` is made on first use from the ``bench`` extra and
holds the same torch as the environment that runs the benchmark. What is timed is a script or a module that
prints one JSON object as the last line of its standard output; a peer's script lies beside this file and
imports nothing from here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def requirements(extra: str) -> list[str]:
    """An extra's, and for detectors the very torch and torchvision that are installed here."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pair = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "torchvision")]
    return [*project["optional-dependencies"][extra], *(pair if extra == "bench" else [])]


def environment(extra: str = "bench") -> Path:
    """The Python interpreter of an extra's peers. Made on first use, and again when the requirements have
    changed.

    Raises:
        subprocess.CalledProcessError: pip could not install the peers; its messages were printed.
    """
    folder = REPOSITORY / f".venv-{extra}"
    python = folder / "bin" / "python"
    complete = folder / "installed.txt"  # written last: an interrupted installation has none
    wanted = "\n".join(requirements(extra))
    if not complete.exists() or complete.read_text() != wanted:
        print(f"installing the peers into {folder.name} (once, some minutes)", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", *requirements(extra)]
        subprocess.run(install, check=True, stdout=sys.stderr)
        complete.write_text(wanted)
    return python


def threads_environment(threads: int | None) -> dict[str, str]:
    """This process's environment with the compute threads fixed; None leaves the libraries' own default."""
    variables = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    if threads is not None:
        variables |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    return variables


def run_timed(command: Sequence[str | Path], threads: int | None = 1) -> dict[str, Any]:
    """Run a command in a process of its own, from the repository's root; read the JSON object it prints last.

    Raises:
        RuntimeError: it failed; the message holds the end of what it wrote.
    """
    done = subprocess.run(
        list(map(str, command)),
        env=threads_environment(threads),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} failed ({ended(done.returncode)}):\n{last_lines(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ended(code: int) -> str:
    """What a process's exit status means, for a person.

    >>> ended(1), ended(-9)
    ('exit status 1', 'killed by SIGKILL; if nobody did, for lack of memory')
    """
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + ("; if nobody did, for lack of memory" if name == "SIGKILL" else "")


def last_lines(written: str, count: int = 20) -> str:
    """The end of what a process wrote, as a terminal shows it: of a progress bar its last state alone.

    >>> last_lines("a\\n 1 %\\r 2 %\\r 3 %\\nValueError: b\\n", 2)
    ' 3 %\\nValueError: b'
    """
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in written.rstrip().split("\n")]
    return "\n".join(lines[-count:])


def run_peer(
    script: str, arguments: Sequence[str | Path], threads: int | None = 1, extra: str = "bench"
) -> dict[str, Any]:
    """Run ``tests/benchmarks/<script>`` with the interpreter of an extra's peers; see :func:`run_timed`."""
    return run_timed([environment(extra), SCRIPTS / script, *arguments], threads)


if __name__ == "__main__":
    print(*map(environment, sys.argv[1:] or ["bench"]))
