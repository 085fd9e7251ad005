"""All that was compared, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_core.verify.checks import Bits, Found


@dataclass(frozen=True)
class Report:
    """All that was compared."""

    losses: list[Found]
    confident: list[Found]
    bits: list[Bits]
    seconds: float

    @property
    def count(self) -> int:
        """How many comparisons were made."""
        return len(self.losses) + len(self.confident) + len(self.bits)

    @property
    def failures(self) -> int:
        """How many of them failed."""
        found = (*self.losses, *self.confident)
        return sum(not f.comparison.ok for f in found) + sum(not b.ok for b in self.bits)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "ok": not self.failures,
            "comparisons": self.count,
            "failures": self.failures,
            "seconds": round(self.seconds, 1),
            **{name: [_plain(f) for f in getattr(self, name)] for name in ("losses", "confident")},
            "bits": [b._asdict() | {"dtype": str(b.dtype), "ok": b.ok} for b in self.bits],
        }


def _plain(found: Found) -> dict[str, Any]:
    """A comparison and where it was made, flat."""
    place = found._asdict() | {"dtype": str(found.dtype)}
    comparison = place.pop("comparison")
    return place | comparison._asdict() | {"ok": comparison.ok}
