"""Groups the rows of bench_steps.py by case, one model and shape."""

import collections

from harness import floor_of

OURS = ("pseuzo PseuZO", "pseuzo PseuZO, captured")
PUBLISHED = "PseuZO as published"
Rows = list[dict[str, str]]


class Case(dict):
    """The rows of one model and shape, by (impl, part)."""

    def ms(self, impl: str, part: str) -> float | None:
        row = self.get((impl, part))
        return float(row["ms_p50"]) if row else None

    def beyond(self, impl: str) -> float | None:
        """Return the ms of a step beyond two forwards."""
        step, floor = self.ms(impl, "step"), self.ms(floor_of(impl), "two forwards")
        return None if step is None or floor is None else step - floor

    def memory(self, impl: str) -> tuple[float, float] | None:
        """Return the peak in GB, and its ratio to the peak of inference.

        The peak is the memory that a call allocates. With graphs it is all memory held since the
        first call, since graphs allocate only while they are recorded.
        """
        kind = "reserved_gb" if "captured" in impl else "peak_gb"
        peak = self.get((impl, "step"), {}).get(kind)
        floor = self.get(("inference", "two forwards"), {}).get(kind)
        return (float(peak), float(peak) / float(floor)) if peak and floor else None

    def best(self) -> str | None:
        """Return our faster way, if one was measured."""
        measured = [impl for impl in OURS if self.beyond(impl) is not None]
        return min(measured, key=lambda impl: self.ms(impl, "step"), default=None)

    def lost(self, impl: str) -> bool:
        """Return whether this way did not fit into memory."""
        parts = [part for at, part in self if at == impl]
        return bool(parts) and all("does not fit" in part for part in parts)


def cases_of(rows: Rows) -> dict[tuple[str, ...], Case]:
    cases: dict[tuple[str, ...], Case] = collections.defaultdict(Case)
    for row in rows:
        key = tuple(row[k] for k in ("model", "dtype", "rows", "tokens"))
        cases[key][row["impl"], row["part"]] = row
    return cases
