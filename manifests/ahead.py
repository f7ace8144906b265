"""Work done ahead of time in threads, its results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_order(
    work: Callable[[Item], Made], items: Iterable[Item], threads: int = 0, ahead: int = 0
) -> Generator[Made, None, None]:
    """``map`` with the work done ahead of time in ``threads`` (0: one a core), results and errors in order.

    ``items`` are taken where the results are, ``ahead`` of them (0: two a thread).
    """
    threads = threads or len(os.sched_getaffinity(0))
    ahead = ahead or 2 * threads
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
