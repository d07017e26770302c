"""Limits on feedback: rates by tenant, all tenants together, and how much may wait for its trace."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hosting import Host, served

from optillm_memory.errors import TooMany
from optillm_memory.host.limits import BURST_S, SHARE, FeedbackLimits
from optillm_memory.records import FeedbackReceipt
from optillm_memory.testing.upstream import RecordingUpstream

UNKNOWN = {"metric": "success", "value": True, "source": "code"}


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        """Start at zero."""
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


def limits(clock: Clock, *, rate: float = 10.0) -> FeedbackLimits:
    """Make limits on the rate alone."""
    return FeedbackLimits(rate, 0, lambda _: 0, clock=clock)


def pending(count: int) -> list[FeedbackReceipt]:
    """Make receipts of feedback that waits."""
    return [FeedbackReceipt(f"fb-{n}", "pending") for n in range(count)]


def test_a_tenant_gets_ten_seconds_worth_at_once_and_then_its_rate() -> None:
    """The burst passes, the next item is refused with the time to wait, and after that time one passes."""
    clock = Clock()
    bucket = limits(clock, rate=10)
    for _ in range(int(10 * BURST_S)):
        bucket.take("t", 1)
    with pytest.raises(TooMany) as refused:
        bucket.take("t", 1)
    assert 0 < refused.value.retry_after_s <= 0.1
    clock.now += refused.value.retry_after_s
    bucket.take("t", 1)
    with pytest.raises(TooMany):
        bucket.take("t", 1)
    clock.now += 1.0
    for _ in range(10):
        bucket.take("t", 1)


def test_a_list_larger_than_the_burst_passes_and_is_paid_back() -> None:
    """A whole list goes through while the bucket holds something, and the tenant waits until its debt is paid."""
    clock = Clock()
    bucket = limits(clock, rate=10)
    bucket.take("t", 1_000)
    with pytest.raises(TooMany) as refused:
        bucket.take("t", 1)
    assert refused.value.retry_after_s == pytest.approx(90.1)
    clock.now += 90.2
    bucket.take("t", 1)


def test_one_tenants_flood_refuses_no_other_and_many_tenants_share_a_limit() -> None:
    """A second tenant is served beside a flood; a caller with a new key for each item meets the limit of all."""
    clock = Clock()
    bucket = limits(clock, rate=10)
    bucket.take("loud", 500)
    with pytest.raises(TooMany):
        bucket.take("loud", 1)
    bucket.take("quiet", 1)
    bucket.take("another", int(10 * BURST_S * SHARE))
    with pytest.raises(TooMany):
        bucket.take("made up for this one", 1)


def test_no_limit_where_the_settings_are_zero() -> None:
    """With both settings at 0 nothing is refused."""
    bucket = limits(Clock(), rate=0)
    for _ in range(10_000):
        bucket.take("t", 1_000)
    bucket.note("t", pending(100_000))
    assert bucket.may_wait("t")


def test_what_waits_in_the_store_counts_and_is_counted_again_later() -> None:
    """A quota that is used up stays so until the store, asked a minute later, has less that waits."""
    clock, asked, stored = Clock(), [], {"t": 100, None: 100}

    def count(tenant: str | None) -> int:
        asked.append(tenant)
        return stored.get(tenant, 0)

    quota = FeedbackLimits(0, 100, count, clock=clock)
    assert quota.may_wait("t")
    quota.note("t", pending(0))
    assert asked == []  # the usual case asks the store for nothing
    quota.note("t", pending(5))
    assert asked == ["t"]
    assert quota.may_wait("other")
    assert not quota.may_wait("t")
    stored["t"] = 3
    clock.now += 30
    assert not quota.may_wait("t")
    clock.now += 31
    assert quota.may_wait("t")


@pytest.fixture(scope="module")
def limited(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start a host with narrow limits."""
    env = {"OPTILLM_AGENT_MEMORY_FEEDBACK_RATE": "2", "OPTILLM_AGENT_MEMORY_PENDING_FEEDBACK": "5"}
    with served(upstream, tmp_path_factory.mktemp("limits") / "memory.db", env=env) as host:
        yield host


@pytest.mark.host
def test_a_flood_is_told_when_to_come_back(limited: Host) -> None:
    """Posted faster than the rate, feedback gets 429 with Retry-After, while another tenant's is taken."""
    trace_id = limited.chat("A question of the loud one", key="loud")["id"]
    found = []
    for n in range(200):
        body = {**UNKNOWN, "trace_id": trace_id, "feedback_id": f"loud-{n}"}
        found.append(limited.route("POST", "feedback", key="loud", json=body))
        if found[-1].status_code == 429:
            break
    assert found[0].status_code == 202
    assert found[-1].status_code == 429
    assert int(found[-1].headers["Retry-After"]) >= 1
    assert found[-1].json()["error"]["code"] == "too_many"
    mine = limited.chat("A question of the quiet one", key="quiet")["id"]
    assert limited.tell({**UNKNOWN, "trace_id": mine}, key="quiet")["status"] == "applied"


@pytest.mark.host
def test_feedback_on_known_traces_is_taken_beside_a_full_quota(limited: Host) -> None:
    """Once five items wait for traces that do not exist, a sixth is refused and nothing of it is kept."""
    known = limited.chat("A question whose answer is judged", key="eager")["id"]
    for n in range(5):
        assert limited.tell({**UNKNOWN, "trace_id": f"chatcmpl-{n:032x}"}, key="eager")["status"] == "pending"
    refused = limited.route("POST", "feedback", key="eager", json={**UNKNOWN, "trace_id": f"chatcmpl-{9:032x}"})
    assert refused.status_code == 429
    assert "waiting" in refused.json()["error"]["message"]
    assert limited.tell({**UNKNOWN, "trace_id": known}, key="eager")["status"] == "applied"


@pytest.mark.host
def test_deletions_at_once_are_all_done(limited: Host) -> None:
    """Eight deletions of overlapping namespaces at once: each is answered with 202, and nothing is there any more."""
    for number in range(16):
        limited.chat(f"A question about subject {number}", key="tidy", memory={"namespace": f"space-{number % 4}"})
    limited.settle()
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(limited.route, "DELETE", f"namespaces/space-{n % 4}", key="tidy") for n in range(8)]
    assert {each.result().status_code for each in found} <= {202, 404}
    assert sum(each.result().status_code == 202 for each in found) >= 4
    assert limited.get("traces", key="tidy")["data"] == []
