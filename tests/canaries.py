"""Secrets in the forms in which they come: each is planted in a text of its own, and must be found by what is around it.

The values are made here, from a seed; none opens anything.
"""

from __future__ import annotations

import json
import random
import string

_ALNUM = string.ascii_letters + string.digits
_HEX = "0123456789abcdef"


def made(length: int, alphabet: str = _ALNUM, seed: int = 7) -> str:
    """Return a value that looks made by chance."""
    draw = random.Random(f"{seed}-{length}-{alphabet}")
    return "".join(draw.choice(alphabet) for _ in range(length))


PASSWORDS = ("hunter2Kq9", "c0rrect-Horse!7", "swordfish", "pässwört9", "83746152")
BASE64 = "Y2FuYXJ5OmMwcnJlY3QtaG9yc2U="
# By name, with the password as {0}.
_OF_PASSWORDS = {
    "env": "PASSWORD={0}\nX=1", "export": "export DB_PASSWORD={0}", "quoted env": 'DB_PASSWORD="{0}"', "docker env": "docker run -e DB_PASSWORD={0} img",
    "Dockerfile": "ENV DB_PASSWORD={0}", "yaml": "user: bob\npassword: {0}\n", "nested yaml": "env:\n  DB_PASSWORD: {0}\n", "ini": "[db]\npassword = {0}\n",
    "toml": 'password = "{0}"', "properties": "spring.datasource.password={0}", "netrc": "machine example.org\n  login bob\n  password {0}\n",
    "netrc line": "machine example.org login bob password {0}", "npmrc password": "_password={0}", "pgpass": "localhost:5432:mydb:bob:{0}\n",
    "postgres url": "postgres://bob:{0}@db:5432/x", "redis url": "redis://:{0}@cache:6379/0", "amqp url": "amqp://bob:{0}@queue//", "git url": "https://bob:{0}@git.example/x.git",
    "connection string": "Server=db;Database=x;User Id=sa;Password={0};Encrypt=true", "odbc": "Driver=x;Uid=sa;Pwd={0}", "jdbc": "jdbc:mysql://h/db?user=x&password={0}",
    "libpq": "host=db user=bob password={0} dbname=x", "PGPASSWORD": "PGPASSWORD={0} psql -h db", "mysql": "mysql -u root -p{0} db", "curl": "curl -u bob:{0} https://example.org",
    "curl quoted": "curl --user 'bob:{0}' https://example.org", "flag": "tool --password {0} --x", "flag with =": "tool --password={0}", "docker login": "docker login -u bob -p {0} reg.example",
    "sshpass": "sshpass -p '{0}' ssh host", "redis-cli": "redis-cli -a {0} ping", "mongosh": "mongosh -u bob -p {0} db", "ldapsearch": "ldapsearch -x -w {0} -b dc=x", "smbclient": "smbclient -U bob%{0} //h/s",
    "query": "https://example.org/login?password={0}&a=b", "xml": "<server><password>{0}</password></server>", "xml attribute": '<add key="DbPassword" value="{0}"/>',
    "k8s env": "- name: DB_PASSWORD\n  value: {0}\n", "k8s literal": "kubectl create secret generic x --from-literal=password={0}", "k8s stringData": "kind: Secret\nstringData:\n  anything: {0}\n",
    "terraform": 'variable "db_password" {{\n  type = string\n  default = "{0}"\n}}', "sql": "CREATE USER x IDENTIFIED BY '{0}'", "postgres sql": "ALTER USER x WITH PASSWORD '{0}'",
    "python": 'connect(user="bob", password="{0}")', "requests": "requests.get(url, auth=('bob', '{0}'))", "subscript": 'config["password"] = "{0}"', "php": "'password' => '{0}',", "ruby": ":password => '{0}'",
    "go": 'password := "{0}"', "typescript": "const password: string = '{0}';", "powershell": "$env:DB_PASSWORD='{0}'", "compose": "environment:\n  - DB_PASS={0}\n", "smtp": "smtp_pass: {0}", "passphrase": "passphrase: {0}",
    "securestring": 'ConvertTo-SecureString "{0}" -AsPlainText', "openssl": "openssl rsa -passin pass:{0} -in k.pem", "stdin": "echo {0} | docker login --password-stdin", "sudo": "echo '{0}' | sudo -S ls",
    "shell in JSON": '{{"command": "export DB_PASSWORD={0}\\nmake"}}',
}  # fmt: skip
# By name: the value, and the text with it as {0}.
_OF_OTHERS = {
    "npmrc": (made(36), "//registry.npmjs.org/:_authToken={0}"), "npmrc auth": (BASE64, "_auth={0}"), "docker config": (BASE64, '{{"auths": {{"reg.example": {{"auth": "{0}"}}}}}}'),
    "k8s data": (BASE64, "apiVersion: v1\nkind: Secret\ndata:\n  anything: {0}\ntype: Opaque\n"), "k8s JSON": (BASE64, '{{"kind": "Secret", "data": {{"x": "{0}"}}}}'),
    "Basic": (BASE64, "Authorization: Basic {0}"), "Bearer": (made(30), "authorization: bearer {0}"), "Token": (made(30), "curl -H 'Authorization: Token {0}' x"), "Bearer in JSON": (made(30), '{{"Authorization": "Bearer {0}"}}'),
    "Cookie": (made(20), "Cookie: sid={0}; theme=dark"), "Set-Cookie": (made(24), "Set-Cookie: session={0}; Path=/; HttpOnly"), "X-Api-Key": (made(24), "X-Api-Key: {0}"), "X-Auth-Token": (made(24), "x-auth-token: {0}"),
    "api_key query": (made(12), "GET https://example.org/a?api_key={0} HTTP/1.1"), "token query": (made(12), "https://example.org/a?x=1&token={0}"), "sig": (made(30), "https://x.blob.core.windows.net/c?sv=2020&sig={0}%3D"),
    "aws query": (made(64, _HEX), "https://b.s3.amazonaws.com/k?X-Amz-Date=2&X-Amz-Signature={0}"), "account key": (made(86), "AccountName=x;AccountKey={0}==;EndpointSuffix=y"), "aws configure": (made(40), "aws configure set aws_secret_access_key {0}"),
    "aws secret": (made(40), "AWS_SECRET_ACCESS_KEY={0}"), "wireguard": (made(43), "[Interface]\nPrivateKey = {0}="), "token url": (made(40), "https://{0}@github.example/x/y.git"), "django": (made(40), "SECRET_KEY = '{0}'"), "rails": (made(64, _HEX), "SECRET_KEY_BASE={0}"),
    "client secret": (made(32), '"client_secret": "{0}"'), "refresh token": (made(32), "refresh_token: {0}"), "camel case": (made(32), "accessToken = '{0}'"), "escaped JSON": (made(32), '{{\\"api_key\\": \\"{0}\\"}}'), "twice escaped": (made(32), '{{\\\\\\"secret\\\\\\": \\\\\\"{0}\\\\\\"}}'),
    "flag token": (made(32), "tool --api-key {0}"), "webhook": (made(24), "https://hooks.slack.com/services/T0123ABCD/B0123ABCD/{0}"), "discord": (made(68), "https://discord.com/api/webhooks/123456789012345678/{0}"), "telegram": (made(35), "https://api.telegram.org/bot123456789:{0}/send"),
    "crypt": (made(86), "root:$6$saltsalt${0}:19000:0:99999:7:::"), "otpauth": (made(32, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"), "otpauth://totp/x?secret={0}&issuer=y"), "jwk": (made(43), '{{"kty": "EC", "crv": "P-256", "d": "{0}"}}'),
    "jwt": (made(43), f"eyJhbGciOiJIUzI1NiJ9.{made(40)}.{{0}}"), "openssh": (made(300), "-----BEGIN OPENSSH PRIVATE KEY-----\n{0}\n-----END OPENSSH PRIVATE KEY-----"), "pem in JSON": (made(64), "-----BEGIN PRIVATE KEY-----\\n{0}\\n-----END PRIVATE KEY-----\\n"),
    "pgp": (made(300), "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{0}\n=abcd\n-----END PGP PRIVATE KEY BLOCK-----"),
}  # fmt: skip
_OF_VENDORS = {
    **dict.fromkeys(("ghp_", "gho_", "ghs_", "npm_"), 36), "github_pat_": 82, "glpat-": 20, "glrt-": 20, "sk-ant-api03-": 93, "sk-proj-": 60, "AIza": 35, "pypi-AgEIcHlwaS5vcmc": 60, "SG.": 66, "shpat_": 32, "dckr_pat_": 27,
    "hf_": 34, "gsk_": 52, "r8_": 37, "xai-": 80, "pplx-": 48, "nvapi-": 64, "lin_api_": 40, "PMAK-": 59, "NRAK-": 27, "tskey-api-": 24, "hvs.": 95, "dp.pt.": 43, "glsa_": 41, "figd_": 40, "ntn_": 46, "sbp_": 40, "ATATT3x": 180, "vcp_": 56,
    "whsec_": 32, "sq0atp-": 22, "ya29.": 60, "xkeysib-": 81, "re_": 32, "csk-": 48, "tgp_v1_": 43, "pcsk_": 69, "rnd_": 28, "LTAI": 20, "tvly-": 32, "phc_": 43, "CCIPAT_": 63, "ops_eyJ": 250, "sk_live_": 24, "xoxb-123456789012-123456789012-": 24,
}  # fmt: skip
_OF_HEX = {"SK": 32, "dapi": 32, "dop_v1_": 64, "sntryu_": 64, "rubygems_": 48, "pul-": 40, "key-": 32}

FORMATS: dict[str, tuple[str, str]] = {
    **{f"{name}/{p}": (p, text.format(p)) for name, text in _OF_PASSWORDS.items() for p in PASSWORDS},
    **{f"json/{p}": (p, json.dumps({"user": "bob", "password": p}, ensure_ascii=False)) for p in PASSWORDS},
    **{name: (value, text.format(value)) for name, (value, text) in _OF_OTHERS.items()},
    **{f"{start}…": (made(n), f"use {start}{made(n)} here") for start, n in _OF_VENDORS.items()},
    **{f"{start}… (hex)": (made(n, _HEX), f"use {start}{made(n, _HEX)} here") for start, n in _OF_HEX.items()},
    "AKIA…": ("QWERTYUIOP234567", "use AKIAQWERTYUIOP234567 here"),
    "AGE…": (
        made(58, string.ascii_uppercase + "23456"),
        f"AGE-SECRET-KEY-1{made(58, string.ascii_uppercase + '23456')}",
    ),
}
"""By name: the secret, and a text that holds it."""

PERSONAL = {
    "card": ("4111 1111 1111 1111", "378282246310005", "5500-0000-0000-0004"),
    "iban": ("DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR1420041010050500013M02606"),
    "email": ("bob.smith+x@mail.example.co.uk", "jürgen@müller.de"),
    "phone": ("+49 170 1234567", "+1 (555) 123-4567", "555-123-4567", "(030) 1234 5678", "0171 123 4567"),
    "ip": ("10.1.2.3", "203.0.113.7", "2001:db8::1", "fe80::1%eth0"),
}
HARMLESS = (
    "password = get_password()", "token = self.token", "def login(user: str, password: str) -> Token:", "password=password,",
    'api_key=os.environ["OPENAI_API_KEY"]', "PASSWORD=$DB_PASSWORD", "password: ${{ secrets.DB_PASSWORD }}", "password: <your password>",
    "the password is required", "max_tokens=256", "tokens = text.split()", "key=lambda pair: pair[1]", "for key, value in items:",
    "https://example.org/a:b?page=2&sort=asc", "a basic introduction", "docker run -p 8000:8000 image", "file.py:12:def:x", "risk-free sk-learn",
    "secret: !vault |", "auth=None", "session = requests.Session()", "postgres://user:password@host/db", "pip install hf_xet-1.8.0-cp38-abi3-manylinux2014_x86_64.whl",
    "123e4567-e89b-12d3-a456-426614174000", "commit 9fceb02d0ae598e95dc970b74767f19372d61af8", "password_file=/run/secrets/db", "if password == other:",
)  # fmt: skip
