"""A host-side bar for a loop that runs in compiled pieces. Nothing is patched, nothing is printed from the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["piece_length", "progress_bar"]


def piece_length(num_steps: int, num_updates: int = 50) -> int:
    """Steps per compiled piece, such that the bar moves about ``num_updates`` times.

    Every piece has this length; where it does not divide ``num_steps``, the last one is filled up with steps that
    do nothing.
    """
    return -(-num_steps // num_updates)


@contextmanager
def progress_bar(num_steps: int, enabled: bool) -> Iterator[Callable[[int], object]]:
    """Yields a function that advances the bar by that many steps; without a bar it does nothing."""
    if not enabled:
        yield lambda _: None
        return
    from tqdm import tqdm  # here, so that importing the library does not import it

    with tqdm(total=num_steps, unit="step") as bar:
        yield bar.update
