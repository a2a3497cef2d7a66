"""What the simulators of push services and of a subscriber have in common: a server, with TLS of our own, the script, what they took."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from channels.simulators.authority import make_authority
from channels.simulators.http2 import Fault, HttpServer, Reply, Request
from channels.simulators.pace import Pace
from channels.simulators.script import Behaviour, Script, magic

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

MAX_REMEMBERED: Final = 200_000
PrivateKey = TypeVar("PrivateKey", ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A message that was taken. Two with the same `key` and `token` are one that was sent twice: the device shows one."""

    reference: str  # the service's own name of it
    key: str  # by which it replaces another on the device
    token: str
    title: str
    message: str
    headers: Mapping[str, str] = field(repr=False)
    body: Mapping[str, Any] = field(repr=False)
    at: float  # of the monotonic clock


class PushSimulator:
    """A push service on loopback. Its files, the certificate authority and our credentials, are in `folder`.

    What is in `folder` already is kept, so that one that starts again knows its devices and is known to its clients.
    `folder` None: a temporary one, gone with the simulator. `is_secure` False: readable HTTP. `clock`: the wall clock, in
    seconds, by which it judges tokens.
    """

    def __init__(  # noqa: PLR0913 - what can be chosen, each by name
        self,
        *,
        script: Script | None = None,
        port: int = 0,
        seed: int = 0,
        folder: Path | None = None,
        is_secure: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.script = script or Script()
        self.messages: deque[Pushed] = deque(maxlen=MAX_REMEMBERED)
        self.calls: deque[float] = deque(maxlen=MAX_REMEMBERED)  # monotonic time of each request that would send
        self.server = HttpServer(self._answer, port=port)
        self._folder = folder
        self._is_temporary = folder is None
        self._is_secure = is_secure
        self._chance = random.Random(seed)  # noqa: S311 - the same each time is what is wanted
        self._clock = clock
        self._pace = Pace()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.port

    @property
    def origin(self) -> str:
        """How it is called in URLs."""
        return f"https://localhost:{self.port}" if self._is_secure else f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """How to configure a provider with it (`channels.config`)."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where its files are, once it runs."""
        assert self._folder is not None
        return self._folder

    async def __aenter__(self) -> Self:
        if self._folder is None:
            self._folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="notify-simulator-"))
        tls: ssl.SSLContext | None = None
        if self._is_secure:
            tls = await asyncio.to_thread(make_authority, self._folder, is_kept=True)
        await self.server.start(tls)
        await asyncio.to_thread(self.make_credentials, self._folder)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop()
        if self._is_temporary and self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = None

    # ---- what each service says

    def make_credentials(self, folder: Path) -> None:
        """Write into `folder` what a client of ours authenticates itself with. Called once the port is known."""
        raise NotImplementedError

    def other(self, request: Request) -> Reply | None:
        """Answer a request that is about no message; None when it is about one."""
        raise NotImplementedError

    def refusal(self, request: Request) -> Reply | None:
        """Answer a request that the real service would refuse, whatever the script says; None when it is sound."""
        raise NotImplementedError

    def message(self, request: Request) -> Pushed:
        """Return the message in a sound request, under a reference that is its own."""
        raise NotImplementedError

    def accepted(self, message: Pushed) -> Reply:
        """Return the answer to a message that was taken."""
        raise NotImplementedError

    def failed(self, behaviour: Behaviour) -> Reply:
        """Return the answer to a message that was not taken."""
        raise NotImplementedError

    def token_of(self, request: Request) -> str:
        """Return which device a request is for; empty when it does not say."""
        raise NotImplementedError

    def garbage(self) -> Reply | Fault:
        """Return an answer that is none."""
        return Reply(status=200, body=b"<html>\xff")

    # ---- what they have in common

    def retry_after(self) -> dict[str, str]:
        """Return the header that says how long to wait."""
        return {"retry-after": str(max(0, round(self.script.retry_after)))}

    def _answer(self, request: Request) -> tuple[float, Reply | Fault]:
        other = self.other(request)
        if other is not None:
            return 0.0, other
        now = time.monotonic()
        self.calls.append(now)
        seconds = self.script.seconds(self._chance)
        behaviour = magic(self.token_of(request)) or self.script.behaviour(self._chance)
        if behaviour is Behaviour.UNAVAILABLE:
            return seconds, self.failed(behaviour)
        if self._pace.is_exceeded(self.script.per_second, now):
            return seconds, self.failed(Behaviour.THROTTLE)
        return seconds, self.refusal(request) or self._end(behaviour, request)

    def _end(self, behaviour: Behaviour, request: Request) -> Reply | Fault:
        match behaviour:
            case Behaviour.ACCEPT:
                return self.accepted(self._take(request))
            case Behaviour.RESET_BEFORE:
                return Fault.REFUSED
            case Behaviour.RESET_AFTER:
                self._take(request)
                return Fault.RESET
            case Behaviour.TIME_OUT:
                self._take(request)
                return Fault.SILENCE
            case Behaviour.GARBAGE:
                self._take(request)
                return self.garbage()
            case _:
                return self.failed(behaviour)

    def _take(self, request: Request) -> Pushed:
        message = self.message(request)
        self.messages.append(message)
        return message


def kept_key(file: Path, make: Callable[[], PrivateKey]) -> PrivateKey:
    """Return the private key in `file`; where there is none, what `make` returns, written there."""
    if file.exists():
        return cast("PrivateKey", load_pem_private_key(file.read_bytes(), None))
    key = make()
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key
