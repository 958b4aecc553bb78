"""Live displays: rich's console on standard output, for terminals only."""

from __future__ import annotations

from collections.abc import Iterable

import rich.console
from rich.segment import Segment

from gateway.terminal import clean


class Console(rich.console.Console):
    """A console that cleans all text before it applies our styles."""

    def __init__(self) -> None:
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)
