"""How many tokens belong to a measured time: those that came in it, whenever their answers began or end.

To count the answers that end in it, with all their tokens, is right in the long run only: requests that began together
end together, and a time shorter than a few answers has too many ends or too few.

- An answer that ended in it counts in part. A stream: as many of its tokens as of its deliveries came in it. A whole
  answer, and any prompt: its tokens spread evenly over the time from its request to its end.
- A request that was open at the end counts by what came of others. A stream: its deliveries until then, times tokens a
  delivery. A whole answer, and any prompt: the seconds that it was open, times tokens a second of an open request, over
  requests that ended, each weighted by how likely it is to be found open (`_open_weights`). By Little's law that is
  right on average, whatever lengths and failures there are, if the load goes on as it was; where every open request
  makes as many tokens a second, it is exact, also if they began together.
- A failed request counts for nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.bench.messages import Records, Sums

Seconds = NDArray[np.float64]


def join(records: Sequence[Records], name: str) -> Seconds:
    """One array of all workers."""
    return np.concatenate([np.frombuffer(getattr(one, name), dtype=np.float64) for one in records])


def tokens_inside(records: Sequence[Records], start: float, end: float) -> tuple[float, float]:
    """Tokens of answers, and of prompts, between two moments."""
    took = np.maximum(join(records, "end_to_end"), 1e-9)
    share = np.clip(join(records, "ended") - start, 0, took) / took
    delivered, tokens, prompts = (join(records, name) for name in ("delivered", "output_tokens", "prompt_tokens"))
    came = np.divide(join(records, "delivered_inside"), delivered, out=share.copy(), where=delivered > 0)
    earlier = _add([one.earlier for one in records])
    open_seconds = sum(one.open_seconds for one in records)

    weights = _open_weights(took, end - start)
    weight = float(weights.sum() + _open_weights(join(records, "failed_after"), end - start).sum())

    def of_open(numbers: Seconds, before: int) -> float:
        if weight:
            return open_seconds * float((numbers / took * weights).sum()) / weight
        # Nothing has ended in a time so short: what ended before is the next best.
        return open_seconds * _ratio(before, earlier.seconds)

    if delivered.any():
        per_delivery = _ratio(float(tokens[delivered > 0].sum()), float(delivered.sum()))
    else:
        per_delivery = _ratio(earlier.tokens, earlier.deliveries)
    if per_delivery:
        begun = sum(one.open_deliveries for one in records) * per_delivery
    else:
        begun = of_open(tokens, earlier.tokens)
    prompts_begun = of_open(prompts, earlier.prompt_tokens)
    return float((tokens * came).sum()) + begun, float((prompts * share).sum()) + prompts_begun


def _open_weights(took: Seconds, window: float) -> Seconds:
    """In proportion to the seconds of the window that requests of such durations are open, of those open at its end.

    At any moment the age of an open request is anything up to its duration, equally likely, and of the age as much is
    inside as the window is long: the integral of min(age, window) over the ages.
    """
    inside = np.minimum(took, window)
    return inside * (took - inside / 2)


def _add(sums: Sequence[Sums]) -> Sums:
    return Sums(
        sum(one.tokens for one in sums),
        sum(one.prompt_tokens for one in sums),
        sum(one.seconds for one in sums),
        sum(one.deliveries for one in sums),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
