"""The answer to "is it faster?", in words, from timed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .providers import providers_on
from .results import OK, WRONG, Row

FASTER, EQUAL, SLOWER, NOT_MEASURED = "faster", "equal", "slower", "not measured"


@dataclass(frozen=True)
class Verdict:
    """The answer of one batch and dtype.

    Args:
        outcome: :data:`FASTER` than every peer, :data:`EQUAL` to the best (the spreads from p20 to p80 overlap),
            :data:`SLOWER` than one, :data:`.results.WRONG`, or :data:`NOT_MEASURED`.
        text: the same in words.
    """

    batch: int | None
    dtype: str
    outcome: str
    text: str


def verdict(rows: Sequence[Row]) -> Verdict:
    """Compares the fastest of our rows with every peer. All rows have one model, batch and dtype."""
    names = {p.name for device in ("cpu", "cuda") for p in providers_on(device) if p.ours}
    mine, peers = ([row for row in rows if (row.provider in names) == own] for own in (True, False))
    batch, dtype = rows[0].infer_batch_size, rows[0].dtype
    wrong = [row for row in mine if row.status.startswith(WRONG)]
    if wrong:
        return Verdict(batch, dtype, WRONG, "; ".join(f"{r.provider}{r.status.removeprefix(WRONG)}" for r in wrong))
    timed = [row for row in mine if row.infer_step_time is not None]
    rivals = [row for row in peers if row.infer_step_time is not None]
    if not timed or not rivals:
        reasons = dict.fromkeys(row.status for row in (peers if timed else mine) if row.status != OK)
        return Verdict(batch, dtype, NOT_MEASURED, "; ".join(reasons) or "no provider to compare with")
    best = min(timed, key=lambda row: row.infer_step_time or 0.0)
    answers = [_against(best, peer) for peer in rivals]
    outcomes = [outcome for outcome, _ in answers]
    outcome = SLOWER if SLOWER in outcomes else EQUAL if EQUAL in outcomes else FASTER
    return Verdict(batch, dtype, outcome, f"{best.provider}: {', '.join(text for _, text in answers)}")


def _against(ours: Row, peer: Row) -> tuple[str, str]:
    assert ours.infer_step_time and peer.infer_step_time and ours.step_time_p20 and peer.step_time_p20
    assert ours.step_time_p80 and peer.step_time_p80
    ratio = peer.infer_step_time / ours.infer_step_time
    if ours.step_time_p80 < peer.step_time_p20:
        return FASTER, f"{ratio:.2f}x faster than {peer.provider}"
    if ours.step_time_p20 > peer.step_time_p80:
        return SLOWER, f"slower than {peer.provider} ({ratio:.2f}x its speed)"
    return EQUAL, f"equal to {peer.provider} ({ratio:.2f}x, p20-p80 overlap)"
