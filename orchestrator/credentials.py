"""Texts and values as they may be stored and shown: without passwords, tokens and keys.

The bottom of the tree: error messages, console, MLflow and run folders all ask here. A connection itself is made with
the address as it was given, which only private files (mode 0600) and this process's memory hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote, unquote

HIDDEN = "***"

_SCHEME = r"\b[A-Za-z][A-Za-z0-9+.-]*://"
_MERE_NAME = "".join(rf"(?<!{scheme}://)" for scheme in ("abfs", "abfss", "sftp", "ssh"))
"""Not behind these: what stands alone before their @ is a container of Azure's or a user, and no secret."""
_ADDRESS = re.compile(rf"({_SCHEME})(?:[^\s:/\"<>`]*:[^\s\"<>`]*|{_MERE_NAME}[^\s/\"<>`]+)@")
"""Everything before the last @ of an address: names are tokens in some (https://TOKEN@host), and passwords may hold a
slash or an @ that nobody has escaped (SQLAlchemy takes both)."""
_WHOLE_ADDRESS = re.compile(rf"^(\s*{_SCHEME})[^/?#]*:.*@|^(\s*{_SCHEME}){_MERE_NAME}[^/]*@", re.DOTALL)
"""The same where the text is nothing but one address: then blanks and quotes belong to the password too."""
_NAMES = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|pwd|secret(?:[_-]\w+)?|token|credential|signature|"
    r"(?:api|access|private|account)[_-]?key)"
)
_QUERY = re.compile(rf"([?&;](?:{_NAMES}|key|sig|auth)s?=)[^\s&;#\"'<>`]+", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(\b{_NAMES}['\"]?\s?=\s?)(?:\"[^\"]*\"|'[^']*'|[^\s&;,)\]}}\"']+)|([\"']{_NAMES}[\"']\s*:\s*)(?:\"[^\"]*\"|'[^']*')",
    re.IGNORECASE,
)
"""`password=...` of a connection string, `HF_TOKEN=...` of a shell, `"secret": "..."` of JSON."""
_HEADER = re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}")
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|sk-[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|dapi[0-9a-f]{32}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
"""What tokens of Hugging Face, GitHub, GitLab, Slack, OpenAI, AWS, Databricks and JSON web tokens look like."""
_SECRET_NAME = re.compile(rf"(?<![a-z]){_NAMES}$", re.IGNORECASE)
_NO_SECRET = re.compile(
    r"(?:^|[_.])(?:pad|eos|bos|unk|sep|cls|mask|decoder_start|image|audio|video)_token$", re.IGNORECASE
)
_IN_ENVIRONMENT = re.compile(r"(?:PASSWORD|PASSWD|TOKEN|SECRET|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)$")
_LEAST_LENGTH = 8
"""A shorter value of an environment variable is a word that stands in other texts too."""

T = TypeVar("T")

_addresses: dict[str, str] = {}
"""Addresses as they were given, by what is shown of them; in this process only."""
_passwords: set[str] = set()
"""Those of the addresses, which libraries may quote alone or in pieces of their own."""
_UNRESERVED = "%!$&'()*+,;=~-._"
"""Characters that a user or a password may have in an address; % is taken to be an escape already."""


def without_credentials(text: str) -> str:
    """A text without what lets somebody in: `user:password@` of addresses, tokens in their queries, `password=...`,
    tokens of known shapes, passwords that `hide` has met, and the values of secret environment variables. The same text
    again stays as it is."""
    text = _ADDRESS.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    text = _ASSIGNED.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}" if found[1] else f'{found[2]}"{HIDDEN}"', text)
    text = _KNOWN.sub(HIDDEN, _HEADER.sub(rf"\1{HIDDEN}", text))
    in_environment = (value for name, value in os.environ.items() if _IN_ENVIRONMENT.search(name))
    for value in (*_passwords, *in_environment):
        if len(value) >= _LEAST_LENGTH and value in text:
            text = text.replace(value, HIDDEN)
    return text


def hide(address: str) -> str:
    """What is shown and stored of an address; this process remembers the rest, for `revealed`."""
    public = _of_value(address)
    if public != address:
        _addresses[public] = address
        user, _, password = _parts(address)[1].partition(":")
        _passwords.update(one for secret in (password or user,) for one in (secret, unquote(secret)))
    return public


def revealed(address: str) -> str | None:
    """The address that `hide` was given, to connect with; itself where it hides nothing, None where nobody knows."""
    return _addresses.get(address) or (None if HIDDEN in address else address)


def escaped(address: str) -> str:
    """An address whose user and password are written as addresses want it (`p@ss` as `p%40ss`); where that is so
    already, it stays."""
    scheme, userinfo, rest = _parts(address)
    if not userinfo:
        return address
    user, found, password = userinfo.partition(":")
    return f"{scheme}{quote(user, safe=_UNRESERVED)}{found}{quote(password, safe=_UNRESERVED)}@{rest}"


def _parts(address: str) -> tuple[str, str, str]:
    """(scheme with ://, user and password, the rest after the @) of an address."""
    match = _WHOLE_ADDRESS.match(address)
    if match is None:
        return "", "", address
    scheme = match[1] or match[2]
    return scheme, address[len(scheme) : match.end() - 1], address[match.end() :]


def public(value: T) -> T:
    """A value of JSON's kinds for a file or an answer: every text in it without credentials, also under a key that
    names a secret; the rest as it is."""
    return _public(value, secret=False)  # type: ignore[no-any-return]


def _public(value: Any, *, secret: bool) -> Any:
    if isinstance(value, str):
        return HIDDEN if secret and value else _of_value(value)
    if isinstance(value, Mapping):
        return {
            (_of_value(key) if isinstance(key, str) else key): _public(
                item, secret=isinstance(key, str) and _is_secret(key)
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_public(item, secret=secret) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and _NO_SECRET.search(name) is None


def _of_value(text: str) -> str:
    return without_credentials(_WHOLE_ADDRESS.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}@", text))
