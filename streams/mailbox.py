"""Where bounces come to, as a URL: apart from whoever reads there, since every command reads the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

_PORTS: Final = {"imaps": 993, "imap+starttls": 143, "imap": 143}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mailbox:
    """Where bounces come to. `scheme`: imaps, imap+starttls (refuses to go on without TLS) or imap (never TLS)."""

    scheme: str
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    folder: str
    token_file: Path | None = None  # of an access token for XOAUTH2, read at each login
    ca_file: Path | None = None
    every_seconds: int = 15


def parse_mailbox(text: str) -> Mailbox:
    """Return the mailbox of a URL: imaps://user:password@host[:port][/folder][?every=…&ca_file=…&auth=xoauth2&token_file=…].

    Raises ValueError with the rest of a sentence; it quotes nothing.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in _PORTS or not parts.hostname or not parts.username:
        raise ValueError("is not an imaps URL with a user")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    auth, token_file, ca_file = (options.pop(name, None) for name in ("auth", "token_file", "ca_file"))
    every = options.pop("every", "15")
    if options or auth not in {None, "xoauth2"} or (auth is None) != (token_file is None):
        raise ValueError("has options other than every and ca_file, or auth=xoauth2 without its token_file")
    if not every.isdigit() or not 1 <= int(every) <= 3_600:
        raise ValueError("has an option every that is not from 1 to 3600 seconds")
    folder = unquote(parts.path.removeprefix("/")) or "INBOX"
    if not folder.isascii() or not folder.isprintable() or '"' in folder or "\\" in folder:
        raise ValueError("has a folder that is not plain ASCII")
    return Mailbox(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        user=unquote(parts.username),
        password=unquote(parts.password or ""),
        folder=folder,
        token_file=Path(token_file).expanduser() if token_file else None,
        ca_file=Path(ca_file).expanduser() if ca_file else None,
        every_seconds=int(every),
    )
