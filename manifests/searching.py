"""Which settings the feedback may change, and how far: a mark beside the setting's default.

::

    shade: Annotated[float, Search(0, 0.5)] = 0.2
    area: Annotated[AreaRange, Search(0.0003, 0.3, log=True)] = (0.002, 0.08)  # both ends
    shape: Annotated[Shape, Search(choices=("blob", "stroke"))] = "blob"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Search:
    """Where to search one number or one choice.

    On a range (a pair of numbers) it holds for both ends, on a mapping for every value. A setting that is
    null, and a share of 0, are not searched: they mean "left out" or "as another setting says".

    Attributes:
        low, high: of a number.
        log: whether its logarithm is searched evenly.
        whole: whether it is a whole number.
        choices: in place of a number: the values that are tried.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()
