"""Endings: what a session shows of its own success where nobody reports it.

It is evidence of the weakest kind, graded by its basis and never verified: an episode that ended well makes a candidate
of its procedure, which is listed and counted, and acts only once `code` or `human` says that it was a success.

| basis | verdict | what the session shows |
|---|---|---|
| `complaint`, `thanks` | failure, success | the user's last words, and nothing was done after them |
| `gave_up` | failure | the agent's last words |
| `rejected`, `submitted` | failure, success | the last action handed in the result, and was refused, or accepted |
| `tests_failed`, `tests_passed` | failure, success | the last test run; a green one counts after a red one |
| `committed` | success | a commit, and no failing action after it |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.conversation.actions import action_of
from optillm_memory.conversation.observation import is_commit, tests_of
from optillm_memory.conversation.steps import calls_of, command_in
from optillm_memory.conversation.text import text_of, without_thoughts
from optillm_memory.learn.procedures.effects import effect_of
from optillm_memory.learn.procedures.mine import SAY, RunStep
from optillm_memory.records import Verdict

_LONGEST_WORD = 400  # characters of a user's last words; longer ones are about something else, too
_THANKS_MOST = 9  # words of a sentence of thanks
_LAST = 700  # characters of an agent's last words that are looked at
_SENTENCE = re.compile(r"[.!,;:\n\u2026\u3002\uff01\uff0c\u3001\u0964]+|\s[-\u2013\u2014]\s|###stop###")
_QUESTION = re.compile(r"[?\uff1f\u061f]")
_THANKS = re.compile(
    r"\b(?:thank(?:s| you)|thx|danke(?:schön)?|vielen dank|merci|gracias|grazie|obrigad[oa]|bedankt|dank (?:je|u)"
    r"|dziękuję|dzięki|teşekkür(?:ler)?(?: ederim)?|tack|tak|kiitos|спасибо|благодарю)\b"
    r"|谢谢|感谢|多谢|ありがとう|감사|고마워|고맙|شكرا|धन्यवाद|शुक्रिया|תודה"
)
_REQUEST = re.compile(
    r"\b(?:but|however|please|can|could|would|need|want|like|now|next|also|not|no longer|aber|bitte|jetzt|noch|mais"
    r"|maintenant|pero|ahora|favor|ma|però|adesso|mas|agora|maar|nu|ale|teraz|но|теперь|пожалуйста|n't)\b|n't\b"
)
_PLEASED = re.compile(
    r"(?:(?:ok|okay|yes|no|oh|wow|ah|great|perfect|super|good|nice|awesome|excellent|wonderful|amazing|cool|brilliant)\s?)*"
    r"|(?:that|it|this|everything)(?:'s| is| was)? (?:all|it|great|perfect|fine|good|right|correct)"
    r"(?: (?:i need(?:ed)?|for (?:now|today)))*"
    r"|(?:that|it|this) (?:works|worked|fixed it|solved it|does it|did it)(?: (?:now|great|perfectly|fine))?"
    r"|(?:that (?:will|would) be|that'll be) all|nothing else|all (?:good|set|done)|(?:good ?)?bye|cheers"
    r"|have a (?:nice|great|good|lovely) (?:day|one|evening|weekend|night)|you too|for (?:your|the|all your) help"
    r"|perfekt|prima|das (?:war|ist) alles|es (?:funktioniert|klappt)(?: jetzt)?|parfait|ça marche|c'est tout"
    r"|perfecto|funciona|eso es todo|perfetto|funziona|perfeito|het werkt|działa|работает|отлично"
)
_COMPLAINTS = re.compile(
    r"\b(?:still|again) (?:broken|wrong|fail(?:s|ing|ed)?|crash(?:es|ing)|an error|not)\b"
    r"|\b(?:that|this|it)(?:'s| is| was) (?:still )?(?:wrong|incorrect|not (?:right|correct|working|what))\b"
    r"|\b(?:does|did|do)(?:n't| not) (?:work|help|compile)\b|\bis(?:n't| not) (?:working|right|correct)\b"
    r"|\bnot what i (?:asked|wanted|meant)\b|\byou(?:'re| are) wrong\b|\buseless\b"
    r"|\b(?:das|es) ist (?:immer noch |leider )?(?:falsch|nicht richtig)\b"
    r"|\b(?:funktioniert|geht|klappt) (?:immer noch |leider |so |jetzt )?nicht\b|\bnicht das was ich\b"
    r"|\bc'est faux\b|\bce n'est pas (?:correct|ce que|bon)\b|\bne (?:marche|fonctionne) (?:toujours )?pas\b"
    r"|\bno funciona\b|\bestá mal\b|\bes incorrecto\b|\bno es (?:correcto|lo que)\b"
    r"|\bnon funziona\b|\bè sbagliato\b|\bnon è (?:corretto|quello che)\b"
    r"|\bnão (?:funciona|é isso|é o que)\b|\bestá errado\b|\bwerkt (?:nog steeds )?niet\b|\bklopt niet\b"
    r"|\bnie działa\b|\bto (?:jest )?źle\b|не работает|неверно|неправильно|\byanl\u0131ş\b"
    r"|不对|不行|错了|没有用|还是不|動きません|動かない|違います|間違って|안 ?돼|안 ?됩니다|틀렸"
)
_GAVE_UP = re.compile(
    r"\bi(?:'m| am| was) (?:not able|unable) to\b|\bi (?:give|gave) up\b|\bgiving up\b"
    r"|\bi (?:could|can)(?: ?not|n't|'t) [^.\n]{0,80}\b(?:complete|solve|fix|finish|resolve|reproduce|find|get)\b"
    r"|\b(?:could|can)(?: ?not|n't|'t) be (?:solved|completed|fixed|resolved)\b"
    r"|\bich (?:konnte|kann) [^.\n]{0,80}\bnicht (?:lösen|abschließen|beheben|finden)\b|\bich gebe auf\b"
    r"|\bje n'(?:ai pas pu|arrive pas)\b|\bj'abandonne\b"
    r"|\bno (?:pude|he podido|puedo) (?:completar|resolver|terminar)\b|\bme rindo\b"
)
_REJECTED = re.compile(r"\b(?:wrong|incorrect|rejected|refused|not (?:accepted|correct|right)|invalid|denied|error)\b")
# How agents of a shell hand in their result.
_SUBMITS = re.compile(
    r"\s*(?:echo\s+)?['\"]?(?:submit|COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT|MINI_SWE_AGENT_FINAL_OUTPUT)\b"
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a session seems to have ended, and what shows it."""

    verdict: Verdict = "unknown"
    basis: str = ""


def may_end(message: Mapping[str, Any]) -> bool:
    """Whether a session can have ended with this message: an answer in words alone, or one that hands in the result.

    It costs little: whoever asks at each step looks at the whole session only where it holds.
    """
    if message.get("role") != "assistant":
        return False
    if calls := calls_of(message, 0):
        return any(_submits(tool, arguments) for _, tool, arguments in calls)
    text = text_of(message)
    command = command_in(text)
    return bool(text.strip()) if command is None else _SUBMITS.match(command) is not None


def ending_of(texts: Sequence[str], steps: Sequence[RunStep], last: Mapping[str, Any]) -> Ending:
    """Return how a session ended: what the user wrote, its steps, and its `last` message."""
    if not may_end(last):
        return Ending()
    acted = [step for step in steps if step.tool != SAY]
    said = Ending()
    if len(texts) > 1 and not any(step.told >= len(texts) for step in acted):
        said = _word_of(texts[-1])
    words = "" if calls_of(last, 0) else text_of(last)
    command = command_in(words)
    if not said.basis and command is None and _GAVE_UP.search(_folded(without_thoughts(words)[-_LAST:])):
        said = Ending("failure", "gave_up")
    return said if said.basis else _shown(acted)


def _shown(acted: Sequence[RunStep]) -> Ending:
    """Return what a session's actions show. That a result was handed in shows nothing until it is accepted."""
    runs = [run for step in acted if (run := _run(step)) != "unknown"]
    found = Ending()
    if runs and runs[-1] == "failure":
        found = Ending("failure", "tests_failed")
    elif acted and acted[-1].observation and _submits(acted[-1].tool, acted[-1].arguments):
        bad = acted[-1].failed or _REJECTED.search(_folded(acted[-1].observation))
        found = Ending("failure", "rejected") if bad else Ending("success", "submitted")
    elif "failure" in runs:
        found = Ending("success", "tests_passed")
    elif _committed(acted):
        found = Ending("success", "committed")
    return found


def _committed(acted: Sequence[RunStep]) -> bool:
    """Whether there is a commit, and no failing action after it."""
    for step in reversed(acted):
        if step.failed or is_commit(step.observation, tool=step.tool, arguments=step.arguments):
            return not step.failed
    return False


def _word_of(text: str) -> Ending:
    """Return what a user's last words say of the work."""
    folded = _folded(text)
    if len(folded) > _LONGEST_WORD:
        return Ending()
    if _COMPLAINTS.search(folded):
        return Ending("failure", "complaint")
    parts = [part.strip(" \"'()*_~#\u00a1\u263a\ufe0f") for part in _SENTENCE.split(folded) if part and part.strip()]
    thanks = [part for part in parts if _THANKS.search(part)]
    pleased = all(_is_thanks(part) or _PLEASED.fullmatch(part) for part in parts)
    return Ending("success", "thanks") if thanks and pleased and not _QUESTION.search(folded) else Ending()


def _is_thanks(part: str) -> bool:
    return bool(_THANKS.search(part)) and len(part.split()) <= _THANKS_MOST and not _REQUEST.search(part)


def _run(step: RunStep) -> Verdict:
    found = tests_of(step.observation, tool=step.tool, arguments=step.arguments)
    return "failure" if found != "unknown" and step.failed else found


def _submits(tool: str, arguments: str) -> bool:
    """Whether a call hands in the result."""
    return effect_of(tool, arguments) == "submits" or _SUBMITS.match(action_of(tool, arguments).text) is not None


def _folded(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").casefold().split(" "))
