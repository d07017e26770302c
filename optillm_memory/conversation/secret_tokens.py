"""Tokens that their vendors gave a recognisable beginning, such as `ghp_`, and private keys.

The beginnings are those of the rule set of Betterleaks 2.0 (MIT licence, Betterleaks Contributors), the successor of
gitleaks' `gitleaks.toml`, as far as a token has one, and some of vendors' documentation. The other rules of that set, which
look for a vendor's name beside any value, are covered by `secret_names`. A beginning is looked for as a plain string;
patterns run only where one was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

Span = tuple[int, int, str]  # where a secret is in a text (start, end), and of which kind it is

_API_KEYS = """
    sk- pk- rk- sk_live_ sk_test_ sk_prod_ rk_live_ rk_test_ rk_prod_ pk_live_ sk_car_ csk- gsk_ xai- pplx- nvapi- r8_ AQ.Ab8RN6
    tgp_v1_ tskey- lin_api_ llx- m0- nyk_ napi_ apify_api_ apikey_ phc_ phx_ pcsk_ pdl_live_ PMAK- NRAK- NRII- NRJS- EZAK EZTK
    duffel_live_ duffel_test_ dvc_client_ dvc_mobile_ dvc_server_ shippo_live_ shippo_test_ rzp_live_ rzp_test_ xkeysib- xsmtpsib-
    xnd_production_ xnd_development_ FLWSECK FLWPUBK dp.pt. dp.st. dp.sa. dp.ct. dt0c01. dt0s01. rdme_ re_ rnd_ rpa_ rootly_ rubygems_
    samsara_api_ sb_secret_ sbp_ csa_ essu_ unkey_ zpka_ waka_ wandb_v1_ vck_ HRKU- API- key- pubkey- mdb_sa_sk_ persona_production_
    mergify_application_key_ CCDB1_ BSA lsv2_pt_ lsv2_sk_ mlsn. ABSK AKCp EXO aact_prod_ aact_hmlg_ pa- jina_ fc- tvly-
"""
_TOKENS = """
    ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat- glptt- gldt- glrt- glcbt- glft- glffct- glimt- gloas- glsoat- glagent- GR1348941
    xoxa- xoxb- xoxc- xoxd- xoxe- xoxe.xox xoxo- xoxp- xoxr- xoxs- xapp- hf_ api_org_ npm_ pypi-Ag dop_v1_ doo_v1_ dor_v1_ ddp_ dapi
    dckr_pat_ dckr_oat_ shpat_ shpca_ shppa_ shpss_ sntrys_ sntryu_ SG. pul- hvs. hvb. hvr. atlasv1. ATATT ATCTT ATBB BBDC- CCIPAT_
    CLOJARS_ glsa_ glc_ figd_ fio-u- ion_ lip_ ntn_ secret_ ya29. 1// EAAA EAAC EAAM EAAD sq0atp- sq0csp- sl. sgp_ tfp_ tss_ tk-us-
    pscale_tkn_ pscale_oauth_ pscale_pw_ pnu_ polar_at_ polar_oat_ polar_pat_ prf_ cfat_ cfut_ vca_ vci_ vcp_ vcr_ vtwn_ ucat_ bkua_
    bkaa_ bkar_ bkct_ bkpt_ bkpat_ cnvca p8e- PRD- cmVmd ico- dnkey- FlyV1 fm1r_ fm2_ wrka- ops_eyJ glsoat- sha256~ SWMKEY-1-
    SWMTKN-1- AIK_CI_ AIK_CLIENT_ AIK_SECRET_ sm_aat_ sm_pat_ sm_sat_ pina_ ramp_sec_ s-s4t2 LTAI STS. AQVN eyJrIjoi
    os_v2_ whsec_ A3- AGE-SECRET-KEY-1 bedrock-api-key- nfp_ sqp_ squ_ sqa_
"""
_LEAST = 12  # characters after a beginning; more after one with which many a name begins
_LEAST_AFTER = {
    **dict.fromkeys(("re_", "fc-", "key-", "A3-", "csa_", "secret_"), 30),
    **dict.fromkeys(("pa-", "1//", "cmVmd"), 40),
    **dict.fromkeys(("m0-", "API-", "EXO", "BSA", "dapi"), 24),
}
_KINDS = {
    **dict.fromkeys(_TOKENS.split(), "token"),
    **dict.fromkeys(_API_KEYS.split(), "api-key"),
}
# Not in the middle of a word; but what precedes may be the `n` of an escaped line break.
_START = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrtbf])|(?<=%[0-9A-F]{2}))"
_BEGINS = _START.replace("_-])", "])", 1)  # a token may also end a name, as in `user-ghp_…`
_REST = r"([A-Za-z0-9_-][A-Za-z0-9_.+/~=-]{7,3000}[A-Za-z0-9_=-])"
_RUNS = re.compile(r"[A-Za-z0-9]{5,}")
_WORD_AND_NUMBER = re.compile(r"[A-Za-z]?[a-z]{2,10}[0-9]{1,4}")
_STEM = 3  # characters: beginnings that begin alike are looked for together
_STEMS: dict[str, list[str]] = {}
for _prefix in _KINDS:
    _STEMS.setdefault(_prefix[:_STEM], []).append(_prefix)

# Blocks and others, by a mark that is looked for in the whole text.
_BLOCKS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    (
        "private-key",
        "-----BEGIN ",
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:(?:\s|\\[nr]){0,4}[A-Z][A-Za-z-]{1,20}: [^\n\\]{0,200}(?:\n|\\n)){0,5}"
            r"[A-Za-z0-9+/=\s\\\"',]{0,20000}(?:-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?"
        ),
    ),
    (
        "private-key",
        "Private-Lines: ",  # PuTTY
        re.compile(r"Private-Lines: [0-9]{1,3}[A-Za-z0-9+/=\s\\]{0,20000}(?:Private-MAC: [0-9a-f]{1,200})?"),
    ),
    (
        "password",
        "$",  # as crypt(3) writes it
        re.compile(r"\$(?:1|2[abxy]|5|6|7|y|apr1|argon2id?|scrypt|pbkdf2[a-z0-9-]{0,12})\$[A-Za-z0-9./$=,+-]{20,300}"),
    ),
    ("token", "AstraCS:", re.compile(r"AstraCS:[A-Za-z0-9:_-]{20,200}")),
    ("token", ":AA", re.compile(r"(?<![0-9])[0-9]{8,11}:AA[A-Za-z0-9_-]{30,40}(?![A-Za-z0-9_-])")),  # Telegram
    ("token", "/bot", re.compile(r"(?<=/bot)[0-9]{6,12}:[A-Za-z0-9_-]{20,60}")),
)
# Words without a fixed beginning, by a mark that is looked for among the words that may be tokens.
_OTHERS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = (
    (
        "access-key",
        ("AKIA", "ASIA", "ABIA", "ACCA", "A3T"),
        re.compile(rf"{_START}(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[0-9A-Z]{{16}}(?![A-Za-z0-9])"),
    ),
    (
        "jwt",
        ("eyJ",),
        re.compile(
            rf"{_START}eyJ[A-Za-z0-9_-]{{10,4000}}\.[A-Za-z0-9_-]{{10,8000}}(?:\.[A-Za-z0-9_-]{{0,4000}}){{1,3}}"
        ),
    ),
    ("token", ("AIza",), re.compile(rf"{_BEGINS}AIza[A-Za-z0-9_-]{{30,60}}")),  # Google
    ("api-key", ("SK", "AC"), re.compile(rf"{_START}(?:SK|AC)[0-9a-f]{{32}}(?![0-9A-Za-z])")),  # Twilio
    ("token", ("Q~",), re.compile(r"(?<![A-Za-z0-9_~.-])[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{28,40}")),  # Azure
    (
        "token",
        ("hooks.slack.com/", "/api/webhooks/", ".webhook.office.com/"),
        re.compile(
            r"(?:(?<=hooks\.slack\.com/services/)|(?<=hooks\.slack\.com/workflows/)|(?<=hooks\.slack\.com/triggers/)"
            r"|(?<=/api/webhooks/)|(?<=\.webhook\.office\.com/))[A-Za-z0-9@/_.%+-]{16,400}"
        ),
    ),
)
_DISCORD = re.compile(r"(?<![A-Za-z0-9_.-])[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,45}(?![\w.-])")
_DISCORD_LEAST = 58
_WORD = re.compile(r"[A-Za-z0-9_.~+/-]{15,}")
_MADE = re.compile(r"[0-9]|[A-Za-z]{12}")


def tokens_in(text: str) -> Iterator[Span]:
    """Yield where tokens and private keys are in a text."""
    for kind, mark, pattern in _BLOCKS:
        if mark in text:
            yield from _all(pattern, text, kind)
    # What may be a token is a small part of a text, and quickly searched for a hundred beginnings.
    words = [word for word in _WORD.findall(text) if _MADE.search(word)]
    if not words:
        return
    joined = " ".join(words)
    for prefix in [p for stem, prefixes in _STEMS.items() if stem in joined for p in prefixes if p in joined]:
        yield from _with_prefix(text, prefix)
    for kind, marks, pattern in _OTHERS:
        if any(mark in joined for mark in marks):
            yield from _all(pattern, text, kind)
    if any(len(word) >= _DISCORD_LEAST and word.count(".") > 1 for word in words):
        yield from _all(_DISCORD, text, "token")


def _all(pattern: re.Pattern[str], text: str, kind: str) -> Iterator[Span]:
    return ((*found.span(), kind) for found in pattern.finditer(text))


def _with_prefix(text: str, prefix: str) -> Iterator[Span]:
    for found in _pattern(prefix).finditer(text):
        if _is_random(found[1], _LEAST_AFTER.get(prefix, _LEAST)):
            yield found.start(), found.end(), _KINDS[prefix]


@cache
def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(f"{_BEGINS}{re.escape(prefix)}{_REST}")


def _is_random(rest: str, least: int) -> bool:
    """Whether what follows a beginning looks made by chance: words and versions that are joined are no token."""
    if len(rest) < least:
        return False
    for run in _RUNS.findall(rest):
        if not _WORD_AND_NUMBER.fullmatch(run) and len(run) >= (
            8 if run.isdigit() else 16 if run.isalpha() and (run.islower() or run.isupper()) else 5
        ):
            return True
    return False
