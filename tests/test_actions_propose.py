"""Proposed actions: what solved episodes predict for a running one, which are equal, and which were right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from optillm_memory.decide.actions import NextAction, action_key, action_partition, label_of, propose_action
from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.gate import ACTION
from optillm_memory.learn.procedures.effects import effect_of
from optillm_memory.learn.procedures.mine import SAY, RunStep, mined
from optillm_memory.learn.procedures.offer import Solved
from optillm_memory.learn.procedures.values import digest_of

USER, GET, CANCEL = "get_user", "get_order", "cancel_order"
ASKED = "cancel order W1234567 of mia_li_3668"
SQL = "run_sql"


def ran(tool: str, observation: Any = "", /, **arguments: Any) -> RunStep:
    """Return a step of an episode; what is no text is shown as JSON."""
    shown = observation if isinstance(observation, str) else json.dumps(observation)
    given = json.dumps(arguments)
    failed = shown.startswith("Error")
    return RunStep(tool, given, shown, failed, effect_of(tool, given))


def asked(reply: str = "yes") -> RunStep:
    """Return a question that the user answered."""
    return RunStep(SAY, "", reply)


RUN = (
    ran(USER, {"id": "mia_li_3668", "card": "gift_1234567", "orders": ["W1234567"]}, user_id="mia_li_3668"),
    ran(GET, {"order": "W1234567", "status": "pending"}, order_id="W1234567"),
    ran("get_card", {"card": "gift_1234567", "balance": 7}, card_id="gift_1234567"),
    asked(),
    ran(CANCEL, "Done.", order_id="W1234567", card_id="gift_1234567"),
)
OTHER = "cancel order W7654321 of bob_ng_1234"
OTHER_RUN = (
    ran(USER, {"id": "bob_ng_1234", "card": "gift_7654321", "orders": ["W7654321"]}, user_id="bob_ng_1234"),
    ran(GET, {"order": "W7654321", "status": "pending"}, order_id="W7654321"),
    ran("get_card", {"card": "gift_7654321", "balance": 9}, card_id="gift_7654321"),
)


def learned(*steps: RunStep, text: str = ASKED, keep: bool = False, **fields: Any) -> Solved:
    """Return a solved episode; with `keep` every step is kept, whether it mattered or not."""
    found = mined([text], steps)
    assert found is not None
    way = found.steps
    if keep:
        each = [mined([text], [step]) for step in steps]
        way = tuple(step for one in each if one is not None for step in one.steps)
    return Solved(**{"memory_id": "proc-0", "episode_id": "ep-0", "similarity": 0.9, "steps": way, "at": 1.0, **fields})


WAY = learned(*RUN[:3], RUN[4])


def proposed(
    *solved: Solved, done: Sequence[RunStep] = (), text: str | Sequence[str] = OTHER, constants: Sequence[str] = ()
) -> Proposal | None:
    """Return what solved episodes propose after the steps that are done."""
    return propose_action(solved, [text] if isinstance(text, str) else text, done, constants.__contains__)


def action(found: Proposal | None) -> tuple[str, Any] | None:
    """Return a proposal's tool and arguments."""
    if found is None:
        return None
    made = NextAction.of_text(found.answer)
    return made.tool, json.loads(made.arguments)


# -- alignment -------------------------------------------------------------------------------------


def test_each_step_follows_from_those_that_are_done() -> None:
    """From the first step to the last one memory proposes what comes next, with this episode's own values."""
    expected = [
        (USER, {"user_id": "bob_ng_1234"}),
        (GET, {"order_id": "W7654321"}),
        ("get_card", {"card_id": "gift_7654321"}),
        (CANCEL, {"order_id": "W7654321", "card_id": "gift_7654321"}),
    ]
    done = (*OTHER_RUN, ran(CANCEL, "Done.", **expected[3][1]))
    for count, wanted in enumerate(expected):
        assert action(proposed(WAY, done=done[:count])) == wanted
    assert proposed(WAY, done=done) is None


def test_what_does_not_go_along_is_followed_by_nothing() -> None:
    """A step that the solved episode did not make, left out or made at another place is a way of its own."""
    assert proposed(WAY, done=[OTHER_RUN[0], ran("track", {"a": 1}, order_id="W7654321")]) is None
    assert proposed(WAY, done=[OTHER_RUN[0], OTHER_RUN[2]]) is None
    assert proposed(WAY, done=[OTHER_RUN[1]]) is None
    assert proposed(WAY, done=[OTHER_RUN[0], OTHER_RUN[0]]) is None
    assert proposed(WAY, done=[OTHER_RUN[1], OTHER_RUN[0]]) is None


@pytest.mark.parametrize(
    "shown",
    [
        {"id": "bob_ng_1234", "card": "gift_7654321"},
        {"id": "bob_ng_1234", "card": "gift_7654321", "orders": ["W7654321"], "tier": "gold"},
        {"id": "bob_ng_1234", "card": "gift_7654321", "orders": []},
        {"id": "bob_ng_1234", "card": 7654321, "orders": ["W7654321"]},
        "bob_ng_1234",
        "",
    ],
    ids=["less", "more", "empty list", "other kind", "text", "nothing"],
)
def test_an_observation_of_another_shape_ends_it(shown: Any) -> None:
    """Where a step showed something of another form than in the solved episode, nothing is proposed."""
    way = learned(RUN[0], RUN[4])
    assert proposed(way, done=OTHER_RUN[:1]) is not None
    assert proposed(way, done=[ran(USER, shown, user_id="bob_ng_1234")]) is None


def test_a_question_may_have_been_asked_and_none_is_passed() -> None:
    """What comes after a question is the LLM's; once it has acted memory may go on, whether it asked or not."""
    way = learned(*RUN, ran("send_receipt", "Done.", order_id="W1234567"))
    assert [s.tool for s in way.steps] == [USER, GET, "get_card", SAY, CANCEL, "send_receipt"]
    made = ran(CANCEL, "Done.", order_id="W7654321", card_id="gift_7654321")
    for said in ((), (asked(),)):
        assert proposed(way, done=[*OTHER_RUN, *said]) is None
        assert action(proposed(way, done=[*OTHER_RUN, *said, made])) == ("send_receipt", {"order_id": "W7654321"})


def test_nothing_follows_a_failed_step() -> None:
    """Wherever a step of the running episode has failed, the rest is the LLM's."""
    way = learned(RUN[0], RUN[4])
    failed = ran(USER, "Error: user not found", user_id="bob")
    assert proposed(way, done=[failed]) is None
    assert proposed(way, done=[failed, *OTHER_RUN[:1]]) is None
    assert proposed(way, done=OTHER_RUN[:1]) is not None


def test_commands_in_a_text_are_not_served() -> None:
    """A step that was a command in an answer's text is no tool call; after it there may be one."""
    command = replace(ran("shell", "a.txt", command="ls"), called=False)
    way = learned(command, equal=True)
    assert proposed(way) is None
    assert action(proposed(learned(replace(command, called=True), equal=True))) == ("shell", {"command": "ls"})


# -- arguments -------------------------------------------------------------------------------------


def test_values_of_the_user_must_be_unmistakable() -> None:
    """A value is taken from what the user wrote where exactly one of its form stands there."""
    way = learned(ran(GET, {"a": 1}, order_id="W1234567"))
    assert action(proposed(way, text="where is W7654321?")) == (GET, {"order_id": "W7654321"})
    assert action(proposed(way, text="where is W7654321? W7654321!")) == (GET, {"order_id": "W7654321"})
    assert action(proposed(way, text=["hello", "I mean W7654321"])) == (GET, {"order_id": "W7654321"})
    assert proposed(way, text="where are W7654321 and W7654322?") is None
    assert proposed(way, text="where is my order?") is None
    assert proposed(way, text="where is W76543210?") is None


def test_two_arguments_of_one_form_are_not_told_apart() -> None:
    """Where two arguments came from the user and look alike, it is not known which is which, nor that both are one."""
    way = learned(ran("get_route", {"km": 7}, start="W1234567", end="W2345678"), text="from W1234567 to W2345678")
    assert proposed(way, text="from W3456789 to W4567890") is None
    assert proposed(way, text="from W3456789 home") is None


def test_values_of_a_step_must_be_unmistakable() -> None:
    """A value is taken from the latest step of its tool where one value stands at its place."""
    first = ran("find_user", {"ids": ["mia_li_3668"]}, name="Mia Li")
    way = learned(first, ran(USER, {"a": 1}, user_id="mia_li_3668"), text="who is Mia Li?")
    assert [s.tool for s in way.steps] == ["find_user", USER]

    def after(ids: Sequence[str]) -> Proposal | None:
        return proposed(way, done=[ran("find_user", {"ids": ids}, name="Bob Ng")], text="who is Bob Ng?")

    assert action(after(["bob_ng_1234"])) == (USER, {"user_id": "bob_ng_1234"})
    assert action(after(["bob_ng_1234", "bob_ng_1234"])) == (USER, {"user_id": "bob_ng_1234"})
    assert after(["bob_ng_1234", "bob_ng_4321"]) is None
    assert proposed(replace(way, steps=way.steps[1:]), text="who is Bob Ng?") is None  # its source was not called


def test_constants_belong_to_the_kind_of_task() -> None:
    """A value that came from nowhere is proposed where it is one of the kind of task; what was made up never."""
    way = learned(ran("get_report", {"a": 1}, kind="monthly", limit=5))
    assert action(proposed(way, constants=["monthly", "5"])) == ("get_report", {"kind": "monthly", "limit": 5})
    assert proposed(way, constants=["5"]) is None
    assert proposed(learned(ran("think", "ok", thought="x" * 60))) is None


def test_a_call_without_arguments() -> None:
    """A call that takes nothing is proposed as such, whatever the episode's goal."""
    assert action(proposed(learned(ran("list_types", {"a": 1})))) == ("list_types", {})


@pytest.mark.parametrize("given", [{"items": ["W1234567"]}, {"filter": {"order": "W1234567"}}])
def test_nested_arguments_are_not_bound(given: dict[str, Any]) -> None:
    """Which values of a list or an object belong together is not known; where the goal is equal it is."""
    way = learned(ran("get_items", {"a": 1}, **given))
    assert proposed(way) is None
    assert action(proposed(replace(way, equal=True))) == ("get_items", given)


def test_equal_goals_are_followed_word_for_word() -> None:
    """Where the goal is the same a look is proposed as it was made, with values that came from nowhere."""
    way = learned(ran(SQL, "[[3]]", query="SELECT count(*) FROM t WHERE a LIKE '%x%' AND b = 'some long literal'"))
    assert proposed(way) is None
    found = proposed(replace(way, equal=True))
    assert action(found) == (SQL, json.loads(way.steps[0].arguments))
    assert found is not None
    assert (found.similarity, found.memory_ids) == (1.0, ("proc-0",))
    # What changes something is bound again, also then.
    change = learned(ran(CANCEL, "Done.", order_id="W1234567"), equal=True)
    assert action(proposed(change, text=ASKED)) == (CANCEL, {"order_id": "W1234567"})
    assert proposed(change, text="cancel it") is None


def test_equal_goals_go_along_with_equal_steps() -> None:
    """Where the goal is the same the steps that are done must be the same; white space and case of SQL do not count."""
    one, two = ran(SQL, "[[1]]", query="SELECT a FROM t"), ran(SQL, "[[2]]", query="SELECT b FROM t")
    way = learned(one, two, keep=True, equal=True)
    assert action(proposed(way, done=[one])) == (SQL, {"query": "SELECT b FROM t"})
    assert action(proposed(way, done=[ran(SQL, "[[1]]", query="select  a from t;")])) == (
        SQL,
        {"query": "SELECT b FROM t"},
    )
    assert proposed(way, done=[two]) is None
    assert proposed(way, done=[ran(SQL, "[[1]]", query="SELECT a FROM u")]) is None


def test_a_detour_on_the_way_to_an_equal_goal_is_passed_over() -> None:
    """A look by a tool that the solved episode did without changes nothing; anything else is a way of its own."""
    look, change = ran("get_store_hours", {"open": 9}), ran("set_store_hours", "Done.", open=9)
    way = replace(WAY, equal=True)
    assert action(proposed(way, done=[RUN[0], look], text=ASKED)) == (GET, {"order_id": "W1234567"})
    assert action(proposed(way, done=[look, RUN[0], look, look], text=ASKED)) == (GET, {"order_id": "W1234567"})
    assert proposed(way, done=[RUN[0], change], text=ASKED) is None
    assert proposed(way, done=[RUN[0], ran("get_store_hours", "Error: closed")], text=ASKED) is None
    assert proposed(way, done=[RUN[0], RUN[0]], text=ASKED) is None
    assert proposed(WAY, done=[OTHER_RUN[0], look]) is None


def test_equal_goals_do_not_bring_back_a_value_that_changed() -> None:
    """Where an earlier step shows another value now, that one is taken, or none where it is not the only one."""
    one = ran(GET, {"parcels": ["PX-0000007"]}, order_id="W1234567")
    way = learned(one, ran("get_parcel", {"a": 1}, parcel_id="PX-0000007"), equal=True)

    def after(*parcels: str) -> Proposal | None:
        return proposed(way, done=[ran(GET, {"parcels": parcels}, order_id="W1234567")], text=ASKED)

    assert action(after("PX-0000007")) == ("get_parcel", {"parcel_id": "PX-0000007"})
    assert action(after("PX-0000007", "PX-0000008")) == ("get_parcel", {"parcel_id": "PX-0000007"})
    assert action(after("PX-0000009")) == ("get_parcel", {"parcel_id": "PX-0000009"})
    assert after("PX-0000008", "PX-0000009") is None


def test_a_result_is_handed_in_again_only_where_it_rests_on_the_same() -> None:
    """An answer to an equal goal is proposed where all that was looked at showed the same, whatever its form."""
    look_up = ran(SQL, "[[41]]", query="SELECT sum(a) FROM t")
    way = learned(look_up, ran("submit", "ok", answer="it is 41 in all"), equal=True)
    assert action(proposed(way, done=[look_up])) == ("submit", {"answer": "it is 41 in all"})
    assert proposed(way, done=[replace(look_up, observation="[[42]]")]) is None
    assert action(proposed(way, done=[replace(look_up, observation="[[ 41 ]]")])) is not None


@pytest.mark.parametrize("arguments", ["ls -l", '{"query": ', "[1]", '"x"', '{"query": "[REDACTED:api-key]"}'])
def test_arguments_that_are_not_whole_are_not_served(arguments: str) -> None:
    """Only a JSON object is served, and none that was redacted or shortened in the log."""
    way = learned(ran(SQL, "[[1]]", query="SELECT 1"), equal=True)
    assert proposed(way) is not None
    assert proposed(replace(way, steps=(replace(way.steps[0], arguments=arguments),))) is None


# -- agreement -------------------------------------------------------------------------------------


def look(query: str, at: float, shown: str = "[[1]]", **fields: Any) -> Solved:
    """Return a solved episode that asked one query."""
    name = f"{at:g}"
    way = learned(ran(SQL, shown, query=query), memory_id=f"proc-{name}", episode_id=f"ep-{name}", at=at)
    return replace(way, equal=True, **fields)


def test_of_equal_ones_the_newest_is_taken() -> None:
    """Queries that show the same support each other, and the one that was asked last is proposed."""
    found = proposed(look("SELECT a FROM t", 3), look("SELECT a, 1 FROM t", 5), look("SELECT a FROM t", 4))
    assert action(found) == (SQL, {"query": "SELECT a, 1 FROM t"})
    assert found is not None
    assert (found.agreement, found.memory_ids) == (1.0, ("proc-5", "proc-3", "proc-4"))
    assert found.score == pytest.approx(5 / 6)


def test_the_same_query_agrees_with_itself_whatever_it_shows() -> None:
    """Data change: the same action is one prediction, though it showed something else each time."""
    found = proposed(*(look("SELECT a FROM t", at, f"[[{at}]]") for at in (1, 2, 3)))
    assert found is not None
    assert (found.agreement, len(found.memory_ids)) == (1.0, 3)
    assert NextAction.of_text(found.answer).observed == digest_of("[[3]]")


def test_equal_goals_that_conflict_lower_the_score() -> None:
    """Of two results to one goal the one with more support is proposed, the newer one where they have the same."""
    old, new = look("SELECT a FROM t", 1), look("SELECT b FROM t", 2, "[[2]]")
    tie = proposed(old, new)
    assert action(tie) == (SQL, {"query": "SELECT b FROM t"})
    assert tie is not None
    assert tie.agreement == pytest.approx(0.5)
    most = proposed(old, new, look("SELECT a FROM t", 0.5))
    assert most is not None
    assert most.agreement == pytest.approx(2 / 3)
    assert most.score < 2 / 3
    assert action(most) == (SQL, {"query": "SELECT a FROM t"})


def test_equal_goals_are_alone() -> None:
    """Where the same goal was solved before, similar ones do not count."""
    other = replace(look("SELECT b FROM t", 9), equal=False)
    found = proposed(other, look("SELECT a FROM t", 1), other)
    assert found is not None
    assert (found.agreement, found.memory_ids) == (1.0, ("proc-1",))


def test_similar_goals_vote_by_value_and_nearness() -> None:
    """An episode counts less as its goal is farther, or its value lower; those that predict nothing disagree."""
    near = learned(ran(GET, {"a": 1}, order_id="W1234567"), memory_id="proc-near")
    far = learned(ran("track", {"a": 1}, order_id="W1234567"), memory_id="proc-far", similarity=0.84)
    found = proposed(near, far)
    assert found is not None
    assert action(found) == (GET, {"order_id": "W7654321"})
    assert found.agreement == pytest.approx(1 / (1 + 2.718281828**-1), abs=1e-6)
    assert found.similarity == pytest.approx(0.9)
    poor = proposed(replace(near, value=0.2), replace(far, similarity=0.9))
    assert action(poor) == ("track", {"order_id": "W7654321"})
    silent = learned(ran("think", "ok", thought="x" * 60), similarity=0.9)
    with_silent = proposed(near, silent)
    assert with_silent is not None
    assert with_silent.agreement == pytest.approx(0.5)
    assert proposed() is None


def test_more_support_is_a_higher_score() -> None:
    """One episode scores 3/4 of agreement times similarity, and each that agrees adds to it."""
    way = learned(ran(GET, {"a": 1}, order_id="W1234567"), similarity=1.0)
    scores = [found.score for n in (1, 2, 3, 13) if (found := proposed(*(replace(way) for _ in range(n)))) is not None]
    assert scores == pytest.approx([3 / 4, 4 / 5, 5 / 6, 15 / 16])


def test_evidence_before_a_wrong_action_does_not_count() -> None:
    """What was solved before an action was found wrong speaks of another world: only newer episodes are followed."""
    wrong = look("SELECT a FROM t", 1, misled=5.0)
    before, after = look("SELECT a FROM t", 4), look("SELECT c FROM t", 6)
    refused = proposed(wrong, before)
    assert refused is not None
    assert refused.vetoes == ("quarantined",)
    found = proposed(wrong, before, after)
    assert found is not None
    assert (action(found), found.vetoes, found.memory_ids) == ((SQL, {"query": "SELECT c FROM t"}), (), ("proc-6",))
    twice = proposed(wrong, replace(after, misled=7.0))
    assert twice is not None
    assert twice.vetoes == ("quarantined",)


# -- what was right --------------------------------------------------------------------------------


STEPS = (
    replace(ran(SQL, "[[1]]", query="SELECT a FROM t"), message=2),
    replace(ran(SQL, "Error: no such column", query="SELECT z FROM t"), message=4),
    replace(ran(SQL, "[[7]]", query="SELECT b FROM t"), message=6),
    replace(ran("submit", "", answer="7"), message=8),
)


def label(query: str, place: int | None = 2, *, observed: str = "", solved: bool | None = True) -> bool | None:
    """Return the label of a query that was proposed for a message, and not served."""
    made = NextAction(SQL, json.dumps({"query": query}), observed and digest_of(observed))
    return label_of(made, place, STEPS, served=False, solved=solved)


def test_a_proposal_is_right_if_the_same_step_comes_and_succeeds() -> None:
    """The same action there or later is right; before that place it does not count, nor where it failed."""
    assert label("SELECT a FROM t") is True
    assert label("select b\nfrom t ;") is True
    assert label("SELECT a FROM t", 4, observed="[[1]]") is False
    assert label("SELECT z FROM t", observed="[[0]]") is False
    assert label("SELECT y FROM t", observed="[[7]]") is True  # it showed what solved the task
    assert label("SELECT y FROM t") is None  # what it showed is not known
    assert label("SELECT y FROM t", 8, observed="[[7]]") is False  # nothing was looked at any more
    assert label("SELECT y FROM t", 10) is False


def test_a_step_that_solved_the_task_and_showed_nothing_tells_nothing() -> None:
    """Where the episode ended with its last step what that showed is not known."""
    ended = (replace(ran(SQL, "", query="SELECT b FROM t"), message=2),)
    other = NextAction(SQL, '{"query": "SELECT a FROM t"}', digest_of("[[7]]"))
    assert label_of(other, 2, ended, served=False, solved=True) is None


def test_only_a_verified_success_labels_what_was_not_served() -> None:
    """A failed episode, and one of which nothing is known, tell nothing of what memory would have done."""
    assert label("SELECT a FROM t", solved=False) is None
    assert label("SELECT a FROM t", solved=None) is None
    assert label("SELECT a FROM t", None) is None


def test_what_was_served_is_the_episodes_own_step() -> None:
    """A served action is wrong once it fails, else as its episode; without its step nothing is known."""
    good, bad = (NextAction(s.tool, s.arguments) for s in STEPS[:2])
    assert [label_of(good, 2, STEPS, served=True, solved=s) for s in (True, False, None)] == [True, False, None]
    assert [label_of(bad, 4, STEPS, served=True, solved=s) for s in (True, False, None)] == [False] * 3
    assert label_of(good, 3, STEPS, served=True, solved=True) is None
    assert label_of(good, None, STEPS, served=True, solved=True) is None


# -- the form in which actions are equal -----------------------------------------------------------


def key(query: str, tool: str = SQL) -> str:
    """Return the form of a query."""
    return action_key(tool, json.dumps({"query": query}))


def test_which_actions_are_equal() -> None:
    """White space and a final semicolon do not count, nor does the case of SQL; what is quoted, and words, do."""
    assert key("SELECT a FROM t") == key("select  A\nfrom T ;") == key("SELECT a FROM t;;")
    assert key("SELECT a FROM t WHERE b = 'X'") == key("select a from t where b = 'X'")
    for quoted in ("'{}'", '"{}"', "`{}`"):
        assert key(f"SELECT {quoted.format('Ab')}") == key(f"select {quoted.format('Ab')}")
        assert key(f"SELECT {quoted.format('Ab')}") != key(f"SELECT {quoted.format('ab')}")
    assert key("SELECT 'It''s A'") != key("SELECT 'It''s a'")
    assert key("SELECT a FROM t") != key("SELECT a FROM u")
    assert key("Select A", "search") != key("select a", "find_books")
    assert action_key("ls", '{"path": "A"}') != action_key("ls", '{"path": "a"}')
    assert action_key("f", '{"a": 1, "b": "x"}') == action_key("f", '{"b":"x","a":1}')


@pytest.mark.parametrize("query", ["SELECT 'a", 'SELECT "a', "SELECT `", "SELECT ''", "SELECT", "", "'"])
def test_quotes_that_are_not_closed_have_a_form(query: str) -> None:
    """Every query has a form, and it is its own again."""
    assert key(query) == key(query + " ")
    assert key(query) != key(query + " x")


def test_a_stored_action_is_the_same() -> None:
    """An action survives its text."""
    made = NextAction("tool é", '{"a": "ü\\n"}', "d")
    assert NextAction.of_text(made.as_text()) == made


def test_partitions_of_actions() -> None:
    """Each tool of an agent has a partition of its own, and shares a pool with the agent's other tools only."""
    one, two, other = action_partition("f1", "a"), action_partition("f1", "b"), action_partition("f2", "a")
    assert len({one, two, other}) == 3
    assert all(name.startswith(ACTION) for name in (one, two, other))
    pools = [name.partition("-")[2] for name in (one, two, other)]
    assert pools[0] == pools[1] != pools[2]
    assert all(pool.startswith(ACTION) for pool in pools)
