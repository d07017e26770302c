"""Limits on feedback: a caller who floods a server must leave the others their disk and their time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optillm_memory.errors import TooMany
from optillm_memory.records import FeedbackReceipt

BURST_S = 10.0  # seconds' worth of feedback that may come at once
SHARE = 10  # all tenants together may use so many times what one may: where the host checks no key, keys cost nothing
_RECOUNT_S = 60.0
_REMEMBERED = 10_000  # tenants; the one that was not seen for longest is dropped


@dataclass(slots=True)
class _Use:
    """What a tenant, or all of them, have used."""

    rate: float
    most: float
    tokens: float
    filled_at: float
    waiting: int = 0
    counted_at: float | None = None  # in the store; None: not yet


class FeedbackLimits:
    """Token buckets for items of feedback, and a quota for those that wait for their trace.

    Thread-safe; each process has its own. `count` returns how much feedback of a tenant waits in the store, and of all
    tenants for None.
    """

    def __init__(
        self,
        rate: float,
        most_waiting: int,
        count: Callable[[str | None], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allow each tenant `rate` items a second on average; 0 is no limit, as for `most_waiting`."""
        self._rate, self._most, self._count, self._clock = rate, most_waiting, count, clock
        self._uses: OrderedDict[str | None, _Use] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, tenant: str, items: int) -> None:
        """Take items from the tenant's bucket; a list goes through whole if anything is in it. Raises TooMany."""
        if not self._rate:
            return
        with self._lock:
            uses = [self._filled(name) for name in (tenant, None)]
            wait_s = max((1.0 - use.tokens) / use.rate for use in uses)
            if wait_s <= 0:
                for use in uses:
                    use.tokens -= items
        if wait_s > 0:
            raise TooMany(f"feedback is limited to {self._rate:g} items a second; try again later", wait_s)

    def may_wait(self, tenant: str) -> bool:
        """Whether more of the tenant's feedback may wait for its trace."""
        return not self._most or all(self._has_room(name) for name in (tenant, None))

    def note(self, tenant: str, receipts: Sequence[FeedbackReceipt]) -> None:
        """Count the feedback that waits from now on, and with a tenant's first what waits in the store already."""
        waiting = sum(receipt.status == "pending" for receipt in receipts)
        if not waiting or not self._most:
            return
        with self._lock:
            uses = [self._filled(name) for name in (tenant, None)]
            for use in uses:
                use.waiting += waiting
            is_first = uses[0].counted_at is None
        if is_first:
            self._count_again(tenant)

    def _has_room(self, name: str | None) -> bool:
        """Whether less waits than may; what is at its limit is counted again now and then."""
        with self._lock:
            use = self._filled(name)
            if use.waiting < use.most:
                return True
            if use.counted_at is not None and self._clock() - use.counted_at < _RECOUNT_S:
                return False
        return self._count_again(name) < use.most

    def _count_again(self, name: str | None) -> int:
        found = self._count(name)
        with self._lock:
            use = self._filled(name)
            use.waiting, use.counted_at = found, self._clock()
        return found

    def _filled(self, name: str | None) -> _Use:
        """Return a tenant's use with its bucket filled up to now; that of all tenants for None."""
        now = self._clock()
        if (use := self._uses.get(name)) is None:
            share = SHARE if name is None else 1
            rate = self._rate * share
            use = self._uses[name] = _Use(rate, self._most * share, rate * BURST_S, now)
            if len(self._uses) > _REMEMBERED:
                del self._uses[next(known for known in self._uses if known is not None)]
        self._uses.move_to_end(name)
        use.tokens = min(use.tokens + (now - use.filled_at) * use.rate, use.rate * BURST_S)
        use.filled_at = now
        return use
