"""The guard: whether the model is about to repeat an action that is known to fail."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optillm_memory.records import PastAttempt, Step

# A failed test or build may pass now, and a server may be back: the action itself is not the cause.
_OTHER_CAUSES = frozenset(("test_summary", "compiler", "http"))
_CHANGEABLE = ("http|", "curl|", "tool|timeout")
# Errors by the state of the environment: a file, a directory, a port, a permission, a peer. It differs elsewhere;
# in the same conversation it changes only by an action.
_STATE = re.compile(
    r"no such (?:file|dir|process|container|image|host|device|table|column|branch|remote)|cannot find the (?:file|path)"
    r"|filenotfound|enoent|eacces|eexist|eaddrinuse|econn|does not exist|doesn't exist|already exists|file exists"
    r"|not a directory|is a directory|directory not empty|not empty|permission denied|operation not permitted"
    r"|read-only file system|no space left|resource busy|text file busy|already in use|already running|is running"
    r"|connection (?:refused|reset|timed out)|could not resolve|name or service not known|network is unreachable"
    r"|timed? ?out|pathspec|not a git repository|unknown revision|nothing to commit|would be overwritten|index\.lock"
    r"|not something we can merge|couldn't find remote|cannot (?:stat|open|access)|can't open|unable to locate"
    r"|unable to access|no matches found|not found in|could not find|cannot find|no rule to make|no targets specified"
    r"|missing script"
    # The same (no such file, permission denied, file exists) in the C library's translations.
    r"|datei oder verzeichnis nicht gefunden|keine berechtigung|datei existiert bereits|ist nicht leer"
    r"|aucun fichier ou dossier|permission non accordée|le fichier existe|n'est pas vide"
    r"|no existe el (?:archivo|fichero)|permiso denegado|(?:archivo|fichero) ya existe"
    r"|file o directory non esistente|permesso negato|file già esistente|file esistente"
    r"|(?:arquivo|ficheiro) ou direct?[oó]ri[oa] inexistente|permissão negada|(?:arquivo|ficheiro) (?:já )?existe"
    r"|bestand of map bestaat niet|toegang geweigerd|bestand bestaat al"
    r"|nie ma takiego pliku|brak dostępu|plik istnieje|böyle bir dosya|erişim engellendi|dosya var"
    r"|filen eller katalogen finns inte|åtkomst nekas|soubor neexistuje|přístup odmítnut"
    r"|нет такого файла|отказано в доступе|файл существует"
    r"|そのようなファイルや|許可がありません|ファイルが存在します|그런 파일이나|허가 거부|파일이 있습니다"
    r"|没有那个文件|权限不够|文件已存在",
    re.IGNORECASE,
)
_WORDS_MOST = 40


def known_to_fail(
    past: Sequence[PastAttempt], here: Sequence[Step], *, episode_id: str, now: float, expiry_s: float
) -> list[PastAttempt]:
    """Return the failures of an action that are reasons not to repeat it, latest first; none where it may work.

    It may work where it succeeded since, where its failures are older than `expiry_s` seconds, where this conversation
    has done something else since (the state has changed), and where it failed in another conversation because of the
    state there: "No such file" says nothing about other folders.
    """
    decided = sorted((p for p in past if p.verdict != "unknown"), key=lambda p: p.at, reverse=True)
    failures: list[PastAttempt] = []
    for attempt in decided:
        if attempt.verdict == "success":
            break
        if now - attempt.at <= expiry_s and not _has_another_cause(attempt, episode_id):
            failures.append(attempt)
    own = {p.step_id for p in failures if p.episode_id == episode_id}
    if own and here and here[-1].step_id not in own and any(s.step_id in own for s in here):
        return []
    return failures


def _has_another_cause(attempt: PastAttempt, episode_id: str) -> bool:
    if attempt.basis in _OTHER_CAUSES or attempt.signature.lower().startswith(_CHANGEABLE):
        return True
    return attempt.episode_id != episode_id and _STATE.search(attempt.message) is not None


def same_but_for_names(action: str, known: str) -> list[int] | None:
    """Return the indices of the words in which an action differs from a known one, if only names differ; else None.

    The program, the flags and the number of words are equal, and at most half of the words differ.
    """
    one, other = action.split(), known.split()
    if len(one) != len(other) or not one or len(one) > _WORDS_MOST or one[0] != other[0]:
        return None
    places = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if not places or 2 * len(places) > len(one) or any(w[i].startswith("-") for w in (one, other) for i in places):
        return None
    return places


def of_same_form(action: str, text: str, places: Sequence[int]) -> bool:
    """Whether a text is the action but for the words at these places."""
    one, other = action.split(), text.split()
    return len(one) == len(other) and all(
        a == b or i in places for i, (a, b) in enumerate(zip(one, other, strict=True))
    )
