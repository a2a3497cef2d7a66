"""How a simulator behaves: the same failure script and the same magic recipients for every protocol.

A script is written as `latency=0.2 jitter=0.1 refused=0.1 rejected=0.05 receipts_delay=1 receipts_lost=0.1`: see `Script`.
Magic recipients do the same whatever the script says. They are told by the end of an address's local part, a number or a
token, so that each protocol has them:

| behaviour   | mailbox                | number (any country) | token or endpoint ends with |
|-------------|------------------------|----------------------|-----------------------------|
| deliver     | deliver@…              | …000001              | magic-deliver               |
| bounce      | bounce@…               | …000002              | magic-bounce                |
| refuse      | refuse@…               | …000003              | magic-refuse                |
| throttle    | throttle@…             | …000004              | magic-throttle              |
| time out    | timeout@…              | …000005              | magic-timeout               |
| complain    | complain@…             | (opts out) …000006   | magic-gone                  |
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, fields, replace
from enum import StrEnum


class Behaviour(StrEnum):
    """What becomes of one message."""

    ACCEPT = "accept"  # taken; a receipt follows where the protocol has them
    BOUNCE = "bounce"  # taken, and later reported as undeliverable; where nothing is reported later: rejected at once
    REFUSE = "refuse"  # not now: a temporary error about this message
    REJECT = "reject"  # never: a permanent error about this message
    THROTTLE = "throttle"  # slow down, with a time to wait where the protocol has one
    UNAVAILABLE = "unavailable"  # the server turns everybody away
    RESET_BEFORE = "reset_before"  # the connection breaks before the message was taken over
    RESET_AFTER = "reset_after"  # the message was taken, and the connection breaks before the answer
    TIME_OUT = "time_out"  # the message was taken, and no answer comes
    GARBAGE = "garbage"  # an answer that is none
    COMPLAIN = "complain"  # taken, then reported as unwanted, or the recipient opts out; a push token is gone


_SHARES = {behaviour: behaviour.value for behaviour in Behaviour if behaviour is not Behaviour.ACCEPT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Shares are from 0 to 1 and add up to 1 at most; what is left is accepted. Times are in seconds."""

    latency: float = 0.0  # before each answer
    jitter: float = 0.0  # up to so much more
    bounce: float = 0.0
    refuse: float = 0.0
    reject: float = 0.0
    throttle: float = 0.0
    unavailable: float = 0.0
    reset_before: float = 0.0
    reset_after: float = 0.0
    time_out: float = 0.0
    garbage: float = 0.0
    complain: float = 0.0
    retry_after: float = 1.0  # what a throttled or unavailable answer says
    receipts_delay: float = 0.0  # before a receipt is sent
    receipts_lost: float = 0.0  # share of receipts that never come
    receipts_doubled: float = 0.0  # share of receipts that come twice
    receipts_first: float = 0.0  # share of receipts that come before the answer to the send
    per_second: float = 0.0  # messages a second that are taken, others throttled; 0: no limit

    def behaviour(self, chance: random.Random) -> Behaviour:
        """Draw what becomes of the next message."""
        drawn = chance.random()
        for behaviour, name in _SHARES.items():
            drawn -= getattr(self, name)
            if drawn < 0:
                return behaviour
        return Behaviour.ACCEPT

    def seconds(self, chance: random.Random) -> float:
        """Draw how long the next answer takes."""
        return self.latency + self.jitter * chance.random()


def parse_script(text: str, base: Script | None = None) -> Script:
    """Return the script in `text`, such as `latency=0.2 refuse=0.1`. Raises ValueError with a sentence."""
    known = {each.name for each in fields(Script)}
    changes: dict[str, float] = {}
    for word in text.replace(",", " ").split():
        name, equals, number = word.partition("=")
        if name not in known:
            raise ValueError(f"{name!r} is not in a script; it has {', '.join(sorted(known))}")
        try:
            changes[name] = float(number)
        except ValueError:
            changes[name] = -1.0
        is_share = name in _SHARES.values() or (name.startswith("receipts_") and name != "receipts_delay")
        if not equals or not 0 <= changes[name] <= (1 if is_share else 86_400):
            raise ValueError(f"{name} is not a number from 0 to {1 if is_share else 86_400}")
    script = replace(base or Script(), **changes)
    if sum(getattr(script, name) for name in _SHARES.values()) > 1 + 1e-9:
        raise ValueError("the shares of failures add up to more than 1")
    return script


_MAGIC = {
    "deliver": Behaviour.ACCEPT,
    "bounce": Behaviour.BOUNCE,
    "refuse": Behaviour.REFUSE,
    "throttle": Behaviour.THROTTLE,
    "timeout": Behaviour.TIME_OUT,
    "complain": Behaviour.COMPLAIN,
    "gone": Behaviour.COMPLAIN,
}
_NUMBERS = {f"00000{number}": behaviour for number, behaviour in enumerate(dict.fromkeys(_MAGIC.values()), 1)}
_WORD = re.compile(r"(?:.*magic-)?(" + "|".join(_MAGIC) + r")", re.DOTALL)


def magic(recipient: str) -> Behaviour | None:
    """Return what a magic recipient does: a mailbox, a number in E.164 or a token; None for any other."""
    local, at, _ = recipient.rpartition("@")
    if at:
        match = _WORD.fullmatch(local)
        return _MAGIC[match[1]] if match and "magic-" not in local else None
    if recipient.lstrip("+").isdigit():
        return _NUMBERS.get(recipient[-6:])
    match = _WORD.fullmatch(recipient)
    return _MAGIC[match[1]] if match and "magic-" in recipient else None
