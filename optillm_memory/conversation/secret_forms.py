"""Secrets by the form of what is around them: URLs, headers, commands, and files with a format of their own.

Each pattern has bounded repetitions and starts at a literal; a text without the literal, as nearly all are, is not searched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from optillm_memory.conversation.secret_tokens import Span
from optillm_memory.conversation.secret_values import is_placeholder

_W = r"(?:[ \t\r\n]|\\[nrt]){1,40}"  # white space, also as JSON writes it
_ARG = r"(?:\\{0,3}\"(?P<a>[^\"\n\\]{1,500})\\{0,3}\"|\\{0,3}'(?P<b>[^'\n\\]{1,500})\\{0,3}'|(?P<c>(?:[^\s\"'\\|&;<>$]|\\(?![nrt\"']))[^\s\"'\\|&;<>]{0,500}))"
_LINE = r"(?P<a>(?:[^\n\r\"'\\]|\\(?![nrt\"'])){3,2000})"
_SCHEME = r"(?:basic|bearer|token|digest|negotiate|ntlm|apikey|api-key|key|aws4-hmac-sha256|hmac|jwt|oauth|splunk|snowflake|bot|genie[a-z]{3})"


def _form(
    kind: str, marks: str, pattern: str, flags: int = re.IGNORECASE
) -> tuple[str, tuple[str, ...], re.Pattern[str]]:
    return kind, tuple(marks.split("|")), re.compile(pattern, flags)


# (kind, marks in lower case, pattern). The secret is in the groups.
_FORMS = (
    # URLs: user and password, or a long user alone, which is a token.
    _form("password", "://", r"(?<=://)(?P<a>[^\s:/@?#\"'<>\[\]$]{0,200}:[^\s/@\"'<>]{1,300})(?=@)"),
    _form("password", "://", r"(?<=://)(?P<a>[^\s:/@?#\"'<>\[\]$]{0,100}:[^\s@\"'<>\\]{1,200})(?=@[\w.-]{1,200}(?::\d{1,5})?(?:[/\s\"'?]|\Z))"),
    _form("token", "://", r"(?<=://)(?P<a>(?=[A-Za-z_.~%+=-]{0,80}[0-9])[A-Za-z0-9_.~%+=-]{16,400})(?=@)"),
    _form("password", "jdbc:", r"jdbc:oracle:thin:[\w.-]{1,60}/(?P<a>[^\s@\"'/]{1,100})@"),
    # Headers.
    _form("token", "authorization", rf"authorization(?:(?:\\*[\"'`\]]){{1,3}}[ \t]{{0,5}},|(?:\\*[\"'`\]]){{0,3}}[ \t]{{0,5}}(?:[:=]|=>))[ \t]{{0,5}}(?:[bfur]?\\*[\"'`]){{0,2}}{_SCHEME}[ \t]{{1,3}}(?![a-z_]{{1,20}}=[\\\"'{{])(?P<a>[^\s\"'`\\<>{{}}$,;)]{{4,4000}})"),
    _form("token", "authorization", r"authorization(?:\\*[\"'`\]]){0,3}[ \t]{0,5}[:=][ \t]{0,5}(?:\\*[\"'`]){0,2}(?P<a>(?=[A-Za-z_.~+/-]{0,200}[0-9])[A-Za-z0-9._~+/=:-]{16,4000})"),
    _form("token", "bearer ", r"(?<=bearer )(?P<a>(?=[A-Za-z_.~+/-]{0,200}[0-9]|[\w.~+/-]{24})[A-Za-z0-9._~+/-]{12,4000}={0,2})"),
    _form("token", "bearer ", r"(?<=bearer )(?P<a>[A-Za-z0-9._~+/-]{20,4000}={0,2})"),
    _form("password", "basic ", r"\bbasic[ \t]{1,2}(?P<a>(?=[A-Za-z+/]{0,80}[0-9=])[A-Za-z0-9+/]{8,2000}={0,2})(?![\w.-])"),
    _form("cookie", "cookie: ", rf"\b(?:set-)?cookie2?:[ \t]{{1,5}}(?=[^\s=;]{{1,100}}=[^\s;]{{4}}){_LINE}"),
    _form("cookie", "cookie", r"\b(?:set-)?cookie\\*[\"']\]?[ \t]{0,5}[:=,][ \t]{0,5}\\*[\"'](?P<a>[^\s=;\"'\\]{1,100}=[^\"'\n\\]{4,2000})"),
    _form("cookie", "sess=|session=|sessid=|sess_id=|session_id=|sessionid=|sid=|csrftoken=|xsrf-token=", r"(?:sess(?:ion)?(?:_?id)?|connect\.sid|\bsid|csrftoken|xsrf-token)=(?P<a>(?=[A-Za-z%._-]{0,60}[0-9])[A-Za-z0-9%._~+/-]{12,1000})"),
    # The queries of signed and of ordinary URLs.
    _form("signature", "sig", r"[?&](?:x-(?:amz|goog|oss|cos|ms)-)?(?:signature|sig|sign)=(?P<a>[^\s&\"'<>\\#]{4,2000})"),
    _form("signature", "x-amz-|x-goog-|x-oss-", r"[?&]x-(?:amz|goog|oss)-(?:credential|security-token)=(?P<a>[^\s&\"'<>\\#]{4,3000})"),
    _form("api-key", "key=", r"[?&](?:[a-z_-]{0,20}[_-]?key|appid|app_id|code|pass|pw|p|auth|access|hash|hmac)=(?P<a>(?=[A-Za-z%._-]{0,60}[0-9])[^\s&\"'<>\\#]{8,2000})"),
    # Commands.
    _form("password", "curl |wget |http |https ", r"\b(?:curl|wget|https?)\b(?:[^\n|]{0,400}?)[ \t](?:-u|--user|--proxy-user|-U|-a|--auth)[ =]?\\{0,3}[\"']?[^\s:\"'\\]{0,100}:(?P<a>[^\s\"'\\]{1,300})"),
    _form("password", "mysql |mysqldump |mysqladmin |mysqlimport |mariadb |mariadb-dump |mycli ", rf"\b(?:mysql|mysqldump|mysqladmin|mysqlimport|mariadb|mariadb-dump|mycli)\b[^\n|;]{{0,300}}?[ \t]-p{_ARG}", 0),
    _form("password", "sshpass |docker login|podman login|helm registry login|az login|oc login|ipmitool |plink |pscp |7z |7za |unrar |zip -", rf"\b(?:sshpass|(?:docker|podman|helm registry|az|oc) login|ipmitool|7za?|unrar|zip|plink|pscp)\b[^\n|;]{{0,300}}?[ \t](?:-p[ =]?|-P[ =]?|-pw[ =]|--password[ =]){_ARG}", 0),
    _form("password", "redis-cli ", rf"\bredis-cli\b[^\n|;]{{0,300}}?[ \t](?:-a|--pass)[ =]{_ARG}", 0),
    _form("password", "mongo |mongosh |mongodump |mongorestore |psexec |evil-winrm ", rf"\b(?:mongo|mongosh|mongodump|mongorestore|psexec|evil-winrm)\b[^\n|;]{{0,300}}?[ \t]-p[ =]?{_ARG}", 0),
    _form("password", "sqlcmd |bcp ", rf"\b(?:sqlcmd|bcp)\b[^\n|;]{{0,300}}?[ \t]-P[ =]?{_ARG}", 0),
    _form("password", "ldapsearch |ldapmodify |ldapadd |ldapdelete |ldapwhoami |ldappasswd ", rf"\bldap[a-z]{{3,8}}\b[^\n|;]{{0,300}}?[ \t]-w[ =]?{_ARG}", 0),
    _form("password", "smbclient |rpcclient |net ", r"\b(?:smbclient|rpcclient|net)\b[^\n|;]{0,300}?[ \t]-U[ ]?\\*[\"']?[^\s%\"'\\]{1,100}%(?P<a>[^\s\"'\\]{1,200})"),
    _form("password", "htpasswd ", rf"\bhtpasswd\b[ \t]+-[a-zA-Z]{{0,6}}b[a-zA-Z]{{0,6}}[ \t]+(?:\S{{1,200}}[ \t]+){{1,2}}{_ARG}[ \t]*(?:$|\n|\\n|[\"'])"),
    _form("password", "sqlplus ", r"\bsqlplus\b[^\n|;]{0,100}?[ \t][\w.$#-]{1,60}/(?P<a>[^\s@\"'/\\]{1,100})(?=[@\s\"'\\]|\Z)"),
    _form("password", "chpasswd", r"\becho\b[ \t]+(?:-n[ \t]+)?\\*[\"']?[\w.-]{1,60}:(?P<a>[^\s\"'\\]{1,200})\\*[\"']?[ \t]*\|[ \t]*(?:sudo[ \t]+)?chpasswd"),
    _form("password", "-stdin|sudo -s|sudo -k", rf"\b(?:echo|printf|printf %s)[ \t]+(?:-n[ \t]+)?{_ARG}[ \t]*\|[ \t]*(?:[a-z]{{2,12}}[ \t]+){{0,2}}(?:[^\n|]{{0,120}}--password-stdin|[^\n|]{{0,60}}--stdin|sudo[ \t]+-[kKSs])"),
    _form("password", "-passin|-passout|pass:", r"\bpass:(?P<a>[^\s\"'\\]{2,200})"),
    _form("secret", "configure set", rf"\bconfigure[ \t]+set[ \t]+[\w.-]{{0,60}}(?:secret|token|key|password)[\w-]{{0,30}}[ \t]+{_ARG}"),
    _form("password", "identified by|password '|password \"|password e'", r"\b(?:identified[ \t]+(?:with[ \t]+\S{1,40}[ \t]+)?by|(?:encrypted[ \t]+)?password)[ \t]+(?:password[ \t]+)?[eE]?\\*[\"'](?P<a>[^\"'\n\\]{1,200})\\*[\"']"),
    _form("password", "convertto-securestring", rf"convertto-securestring[ \t]+(?:-string[ \t]+)?{_ARG}"),
    _form("password", "setx|net user|cmdkey", rf"\b(?:net[ \t]+user[ \t]+[\w.-]{{1,40}}[ \t]+{_ARG}|cmdkey\b[^\n]{{0,200}}/pass:(?P<d>[^\s\"'\\]{{1,200}}))"),
    # Files with a format of their own.
    _form("password", "password|passwd", rf"\b(?:login|user|account){_W}[^\s\"'\\]{{1,100}}{_W}(?:account{_W}[^\s\"'\\]{{1,100}}{_W})?(?:password|passwd){_W}(?P<a>(?:[^\s\\\"']|\\(?![nrt\"'])){{1,300}})"),
    _form("password", "password", rf"\b(?:machine{_W}[^\s\"'\\]{{1,200}}|default){_W}password{_W}(?P<a>(?:[^\s\\\"']|\\(?![nrt\"'])){{1,300}})"),
    _form("password", "auth", r"\bauth[ \t]{0,3}=[ \t]{0,3}\([ \t]{0,3}[bfu]?\\*[\"'][^\"'\n\\]{0,100}\\*[\"'][ \t]{0,3},[ \t]{0,3}[bfu]?\\*[\"'](?P<a>[^\"'\n\\]{1,200})\\*[\"']"),
    _form("password", 'auth\\"|auth"', r"\\*\"auth\\*\"[ \t]{0,3}:[ \t]{0,3}\\*\"(?P<a>[A-Za-z0-9+/]{8,2000}={0,2})\\*\""),
    _form("password", "variable ", r"\bvariable[ \t]{1,3}\\*\"[\w-]{0,60}(?:password|passwd|secret|token|_key|credential)[\w-]{0,30}\\*\"[ \t]{0,3}\{[^}]{0,600}?\bdefault[ \t]{0,5}=[ \t]{0,5}\\*\"(?P<a>[^\"\n\\]{1,500})"),
    _form("private-key", "kty", r"\\*\"(?:d|p|q|dp|dq|qi|k)\\*\"[ \t]{0,3}:[ \t]{0,3}\\*\"(?P<a>[A-Za-z0-9_-]{16,2000})\\*\""),
    _form("private-key", "privatekey|presharedkey", r"\b(?:privatekey|presharedkey)[ \t]{0,3}=[ \t]{0,3}(?P<a>[A-Za-z0-9+/]{43}=)"),
    _form("secret", "otpauth://", r"(?<=otpauth://)[^\s\"'\\]{1,300}?[?&]secret=(?P<a>[A-Z2-7a-z]{8,200})"),
    _form("token", "sentry", r"(?<=://)(?P<a>[0-9a-f]{32})(?=@[\w.-]{0,60}sentry)"),
)  # fmt: skip
_MARKED = tuple((mark, (kind, pattern)) for kind, marks, pattern in _FORMS for mark in marks)
_PORT = re.compile(r":(?:\*|[0-9]{2,5}):(?=[A-Za-z0-9_*-]{1,63}:)")
_HOST = re.compile(r"(?:(?<![^\s\"'`])|(?<=\\n))[A-Za-z0-9*][A-Za-z0-9_.*-]{0,100}\Z")
_AFTER_PORT = re.compile(
    r"[A-Za-z0-9_*-]{1,63}:[A-Za-z0-9_.*@-]{1,63}:((?:[^\s\"'`:\\]|\\[:\\]){3,200})(?=\s|\\n|[\"'`]|\Z)"
)
_SOURCES = tuple(
    f".{name}"
    for name in ["py", "c", "h", "js", "ts", "go", "rs", "java", "rb", "md", "txt", "log", "cpp", "cc", "php", "sh"]
)
_SECRET_KIND = re.compile(r"\\*[\"']?kind\\*[\"']?[ \t]{0,3}:[ \t]{0,3}\\*[\"']?Secret\b")
_DATA = re.compile(r"\\*[\"']?(?:data|stringData)\\*[\"']?[ \t]{0,3}:[ \t]{0,3}(?:\{|\r?\n|\\n)")
_ENTRY = re.compile(
    r"(?:\s|\\[nrt]|,){0,60}(?:#[^\n\\]{0,200}(?:\n|\\n)\s{0,60})?\\{0,3}[\"']?[A-Za-z0-9._-]{1,253}\\{0,3}[\"']?[ \t]{0,3}:[ \t]{0,3}"
    r"(?:[|>][-+]?(?:\n|\\n)[ \t]{1,40})?\\{0,3}[\"']?(?P<a>(?:[^\s\"'\\,}]|\\(?![nrt\"'])){1,8000})\\{0,3}[\"']?"
)


def forms_in(text: str) -> Iterator[Span]:
    """Yield where secrets are in a text, by the form of what is around them."""
    low = text.lower()
    for kind, pattern in dict.fromkeys([form for mark, form in _MARKED if mark in low]):
        for found in pattern.finditer(text):
            for group, value in found.groupdict().items():
                if value and not is_placeholder(value.rpartition(":")[2]):
                    yield *found.span(group), kind
    if ":" in text:
        yield from _in_pgpass(text)
    if "Secret" in text:
        yield from _in_manifests(text)


def _in_pgpass(text: str) -> Iterator[Span]:
    """Yield the passwords of lines `host:port:database:user:password`, as PostgreSQL's password file has them."""
    for port in _PORT.finditer(text):
        start = max(text.rfind("\n", 0, port.start()) + 1, port.start() - 100)
        host = _HOST.search(text, start, port.start())
        rest = _AFTER_PORT.match(text, port.end())
        if host is not None and rest is not None and not host[0].endswith(_SOURCES):
            yield *rest.span(1), "password"


def _in_manifests(text: str) -> Iterator[Span]:
    """Yield the values of Kubernetes secrets, in YAML or JSON: all that is in `data` is secret, whatever its name."""
    if _SECRET_KIND.search(text) is None:
        return
    for data in _DATA.finditer(text):
        at, indent = data.end(), text[max(text.rfind("\n", 0, data.start()) + 1, 0) : data.start()]
        is_json = text[at - 1] == "{"
        for _ in range(200):
            found = _ENTRY.match(text, at)
            if found is None or "---" in found[0][:8]:
                break
            line = text[max(text.rfind("\n", 0, found.start("a")) + 1, 0) : found.start("a")]
            if not is_json and not indent.strip() and not line.startswith(indent + " ") and "\\n" not in found[0]:
                break
            yield *found.span("a"), "secret"
            at = found.end()
            if is_json and text[at : at + 40].lstrip(" \t\n\\nrt").startswith("}"):
                break
