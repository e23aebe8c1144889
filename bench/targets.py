"""Defines the targets for an H100 or H200, and checks whether the measured rows reach them."""

import re
from collections.abc import Callable

from cases import OURS, PUBLISHED, Case, Rows, cases_of

Target = tuple[str, str, str]  # the target, what was measured, and whether it is met


def judged(rows: Rows, device: str) -> bool:
    """Return whether the device has targets: they are for an H100 or H200."""
    return bool(re.search("H100|H200", device)) and not any(row["threads"] for row in rows)


def target(
    text: str, measured: dict[str, float | None], met: Callable[[float], bool], unit: str = ""
) -> Target:
    """Return a target. measured: a case such as "16 x 64" -> its value, None if it is missing."""
    if not measured or None in measured.values():
        return text, "not measured", "-"
    values = ", ".join(f"{value:.3g}{unit} ({where})" for where, value in measured.items())
    return text, values, "met" if all(map(met, measured.values())) else "NOT MET"


def kernel_targets(rows: Rows, device: str) -> list[Target]:
    """Return the targets that rows of bench_add_noise.py can meet."""
    if not judged(rows, device):
        return []

    def values(column: str, **where: str) -> dict[str, float | None]:
        where |= dict(dtype="bfloat16")
        found = [row for row in rows if where.items() <= row.items() and row.get(column)]
        return {f"{row['n']} elements": float(row[column]) for row in found}

    update = values("pct_of_predicted", op="update", impl="pseuzo", K="14")
    perturb = values("pct_of_copy", op="perturb", impl="pseuzo, out of place")
    rate = "update, bf16, K = 14: at least 80 % of the predicted rate"
    bandwidth = "perturb, bf16: at least 85 % of the bandwidth of copy_"
    return [
        target(rate, update, lambda x: x >= 80, " %"),
        target(bandwidth, perturb, lambda x: x >= 85, " %"),
    ]


def step_targets(rows: Rows, device: str) -> list[Target]:
    """Return the targets that rows of bench_steps.py can meet."""
    if not judged(rows, device):
        return []
    cases = {k: c for k, c in cases_of(rows).items() if k[1:3] == ("bfloat16", "16")}

    def at(tokens: str, value: Callable[[Case, str], float | None]) -> dict[str, float | None]:
        """Return the value of OPT-1.3B's case, by our faster way."""
        case = cases.get(("opt-1.3b", "bfloat16", "16", tokens), Case())
        best = case.best()
        where = f"16 x {tokens}" + (best or "").removeprefix(OURS[0])
        return {where: value(case, best) if best else None}

    def times_less(case: Case, best: str) -> float | None:
        """Return the ratio of the published way's overhead to ours. An overhead too small to
        measure counts as a microsecond."""
        published = case.beyond(PUBLISHED)
        return published and published / max(case.beyond(best), 1e-3)

    def times_faster(case: Case, best: str) -> float | None:
        published = case.ms(PUBLISHED, "step")
        return published and published / case.ms(best, "step")

    def share(case: Case, best: str) -> float:
        return 100 * case.beyond(best) / case.ms(best, "step")

    found = [
        target(
            "OPT-1.3B, K = 14: at most 7 ms beyond two forwards",
            at("64", Case.beyond) | at("256", Case.beyond),
            lambda ms: ms <= 7,
            " ms",
        ),
        target(
            "at most 25 % of the step at 16 x 256",
            at("256", share),
            lambda percent: percent <= 25,
            " %",
        ),
        target(
            "at least 15 times less than PseuZO as published",
            at("64", times_less) | at("256", times_less),
            lambda times: times >= 15,
            "x",
        ),
        target(
            "whole step at least 5 times faster at 16 x 64",
            at("64", times_faster),
            lambda times: times >= 5,
            "x",
        ),
    ]
    for impl, how in zip(OURS, ("", ", captured"), strict=True):
        memory = {
            f"{model}, 16 x {tokens}": peak[1]
            for (model, _, _, tokens), case in cases.items()
            if (peak := case.memory(impl))
        }
        worst = dict([max(memory.items(), key=lambda item: item[1])]) if memory else {}
        text = f"peak memory at most 1.15 times inference, full tuning{how}"
        found.append(target(text, worst, lambda x: x <= 1.15, "x at most"))
    for model, text, gb, on in (
        ("opt-13b", "OPT-13B full tuning on one 80 GB card", 80, ""),
        ("opt-30b", "OPT-30B full tuning on an H200", 141, "H200"),
    ):
        here = {k[3]: c for k, c in cases.items() if k[0] == model} if on in device else {}
        if any(case.lost(OURS[0]) or case.lost("inference") for case in here.values()):
            found.append((text, "does not fit", "NOT MET"))
        elif on in device:
            peaks = {
                f"16 x {tokens}": m[0] for tokens, c in here.items() if (m := c.memory(OURS[0]))
            }
            found.append(target(text, peaks, lambda peak, gb=gb: peak <= gb, " GB"))
    return found


TARGETS = {"add_noise": kernel_targets, "steps": step_targets}
