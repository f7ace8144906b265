"""What a person sees while something runs: lines on standard error, and a bar with rate and time left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Advance(Protocol):
    def __call__(self, count: int, total: int | None = None, /) -> None: ...


# Of several training processes, the first alone speaks.
console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="cyan")


@contextmanager
def progress(title: str, total: int | None, unit: str = "") -> Iterator[Advance]:
    """A bar for ``total`` pieces of work; the yielded function adds finished ones (and may say the total).

    Where standard error is no terminal (logs), a line is written at the end only.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int, total: int | None = None) -> None:
            bar.update(task, advance=count, total=total)

        yield advance


def say(text: str) -> None:
    console.print(text, markup=False)


@contextmanager
def late(text: str, seconds: float = 2.0) -> Iterator[None]:
    """Says what is going on, but only where it takes longer than ``seconds``."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
