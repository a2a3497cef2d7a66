"""Ids are computed, never drawn: the same event told again is the same notification (design rule 3).

A notification id is 32 hexadecimal digits: 8 of the murmur2 hash of the user id, so that a query by id alone finds the
partition, and 24 of a BLAKE2b hash (RFC 7693) over producer, event identity, rule and user.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import NewType

NotificationId = NewType("NotificationId", str)
DeliveryId = NewType("DeliveryId", str)

_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


@lru_cache(maxsize=100_000)
def murmur2(key: bytes) -> int:
    """Return Kafka's 32-bit murmur2 of `key`, as an unsigned number. Source: org.apache.kafka.common.utils.Utils."""
    length = len(key)
    h = (0x9747B28C ^ length) & _MASK
    for i in range(0, length - 3, 4):
        k = int.from_bytes(key[i : i + 4], "little") * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    rest = key[length & ~3 :]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition that the Java client's default partitioner gives `key`, from 0 to `partitions` - 1."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def digest(*parts: str, size: int) -> str:
    """Return a BLAKE2b hash of `parts` as 2 x `size` hexadecimal digits. Parts are length-prefixed: ab,c is not a,bc."""
    joined = b"".join(len(encoded).to_bytes(4, "big") + encoded for encoded in (part.encode() for part in parts))
    return blake2b(joined, digest_size=size).hexdigest()


def notification_id(*, producer: str, event_id: str, rule: str, user_id: str) -> NotificationId:
    """Return the id of what `rule` makes of an event for a user."""
    return NotificationId(f"{murmur2(user_id.encode()):08x}{digest(producer, event_id, rule, user_id, size=12)}")


def is_notification_id(text: str) -> bool:
    """Say whether `text` has the shape of a notification id."""
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def partition_of_notification(notification: str, partitions: int) -> int:
    """Return the partition of the user that a notification id embeds."""
    return (int(notification[:8], 16) & 0x7FFFFFFF) % partitions


def delivery_id(notification: NotificationId, channel: str, device: str | None = None) -> DeliveryId:
    """Return the id of a notification's delivery on a channel; where a user has several devices there, to one of them."""
    return DeliveryId(f"{notification}-{channel}" if device is None else f"{notification}-{channel}-{digest(device, size=6)}")
