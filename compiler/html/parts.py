"""What several attentions may show stands in the page once."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

LARGE_LIMIT = 1_500_000  # bytes of pictures and graphs together; those of further sites are left out


@dataclass
class Parts:
    """Each distinct part with its number, by which sites name it."""

    found: dict[Markup, int] = field(default_factory=dict)
    large_bytes: int = 0
    left_out: int = 0

    def add(self, content: Markup) -> int:
        return self.found.setdefault(content, len(self.found))

    def add_large(self, content: Markup) -> int | None:
        """None where the page has as much of that as it may."""
        if content not in self.found:
            size = len(content.encode())
            if self.large_bytes + size > LARGE_LIMIT:
                self.left_out += 1
                return None
            self.large_bytes += size
        return self.add(content)
