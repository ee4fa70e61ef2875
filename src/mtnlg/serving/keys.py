"""Who may use the server: keys, kept as digests and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from mtnlg.config.errors import ConfigError
from mtnlg.config.serving import ServerConfig
from mtnlg.serving.errors import missing_key, no_admin, wrong_key
from mtnlg.serving.limits import Allowance, Caller, Clock

ANONYMOUS, ADMIN = "anonymous", "admin"
LIMITS = tuple(field.name for field in fields(Allowance))


class Keys:
    """The keys that are let in, and what is left to each.

    Args:
        callers: digest of a key (SHA-256) and whose it is; empty lets everybody in.
        anonymous: who they are then.
        admin: the same for the key that may change what is served; ``None`` lets nobody.
    """

    def __init__(
        self,
        callers: Sequence[tuple[bytes, Caller]],
        anonymous: Caller,
        admin: tuple[bytes, Caller] | None = None,
    ) -> None:
        self._callers = list(callers)
        self._anonymous, self._admin = anonymous, admin

    @classmethod
    def of_config(cls, config: ServerConfig, clock: Clock = time.monotonic) -> Keys:
        """The keys of the settings and of their file.

        Raises:
            ConfigError: the file is missing, is not what it should be, or holds a key twice.
        """
        usual = Allowance(config.requests_per_minute, config.tokens_per_minute, config.concurrency)
        found = [
            (_digest(key), f"key-{number}", usual) for number, key in enumerate(config.api_keys, start=1)
        ]
        if config.api_key_file is not None:
            found += read_key_file(Path(config.api_key_file), usual)
        if len({digest for digest, _, _ in found}) < len(found):
            raise ConfigError("the same API key is given twice: leave one out.")
        callers = [(digest, Caller(name, limits, clock)) for digest, name, limits in found]
        admin = None
        if config.admin_key is not None:
            admin = (_digest(config.admin_key), Caller(ADMIN, Allowance(), clock))
        return cls(callers, Caller(ANONYMOUS, usual, clock), admin)

    @property
    def is_open(self) -> bool:
        """Whether everybody is let in."""
        return not self._callers

    def caller(self, authorization: str | None) -> Caller:
        """Whose key stands in an ``Authorization`` header.

        Raises:
            ApiError: 401.
        """
        if self.is_open:
            return self._anonymous
        key = _key_of(authorization)
        digest, found = _digest(key), None
        for known, caller in self._callers:  # all of them, so that time tells nothing
            if hmac.compare_digest(digest, known):
                found = caller
        if found is None:
            raise wrong_key(key)
        return found

    def admin(self, authorization: str | None) -> Caller:
        """Who may change what is served.

        Raises:
            ApiError: 401; 403 where nobody may.
        """
        if self._admin is None:
            raise no_admin()
        key = _key_of(authorization)
        if not hmac.compare_digest(_digest(key), self._admin[0]):
            raise wrong_key(key)
        return self._admin[1]


def _key_of(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise missing_key()
    return key


def read_key_file(path: Path, usual: Allowance) -> list[tuple[bytes, str, Allowance]]:
    """Keys with their names and limits.

    The file has one key a line, or is a YAML list of ``{key: ..., name: ..., requests_per_minute: ...,
    tokens_per_minute: ..., concurrency: ...}`` where ``sha256`` may stand for ``key``.

    Args:
        path: of the file.
        usual: limits of a key for which none are said.

    Raises:
        ConfigError: what is wrong with the file, and where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the key file {path} is no UTF-8 text.") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"the key file {path} holds no key: write one a line.")
    if not re.match(r"(-\s|\[|-$)", lines[0]):
        return [_entry({"key": line}, number, path, usual) for number, line in enumerate(lines, start=1)]
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" in line {place.line + 1}" if place else ""
        raise ConfigError(f"the key file {path} is no valid YAML{where}.") from error
    return [_entry(entry, number, path, usual) for number, entry in enumerate(entries, start=1)]


def _entry(entry: Any, number: int, path: Path, usual: Allowance) -> tuple[bytes, str, Allowance]:
    where = f"the key file {path}, entry {number}"
    entry = {"key": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: write a key, or key: and what belongs to it.")
    if unknown := set(entry) - {"key", "sha256", "name", *LIMITS}:
        raise ConfigError(f"{where}: {', '.join(map(str, sorted(unknown, key=str)))} means nothing here.")
    if ("key" in entry) == ("sha256" in entry):
        raise ConfigError(f"{where}: give either key or sha256.")
    limits = {name: entry[name] for name in LIMITS if name in entry}
    for name, value in limits.items():
        if type(value) is not int or value < 0:
            raise ConfigError(f"{where}: {name} is {value!r}: it must be a whole number, 0 for no limit.")
    name = str(entry.get("name", f"file-{number}"))
    return _key_digest(entry, where), name, replace(usual, **limits)


def _key_digest(entry: dict[str, Any], where: str) -> bytes:
    if "sha256" in entry:
        text = str(entry["sha256"])
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits.")
        return bytes.fromhex(text)
    key = entry["key"]
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"{where}: a key is text without spaces, of ASCII letters, digits and signs.")
    return _digest(key)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
