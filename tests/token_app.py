"""The product's worker on a broker that asks for tokens: unsigned ones in the place of Amazon's.

They are of TOKEN_USER, and live TOKEN_SECONDS.
"""

from __future__ import annotations

import base64
import json
import os
import time
from dataclasses import replace

from streams.app import Worker, build_app
from streams.security import TokenSource
from streams.settings import WORKER_NEEDS, Settings


def unsigned(user: str, *, seconds: float = 600) -> TokenSource:
    """Return tokens that the test's broker believes: what Amazon signs, it takes unsigned."""

    def part_of(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    def tokens() -> tuple[str, float]:
        expires = time.time() + seconds
        return f"{part_of({'alg': 'none'})}.{part_of({'sub': user, 'iat': int(time.time()), 'exp': int(expires)})}.", expires

    return tokens


def make() -> Worker:
    settings = Settings.from_env({k: v for k, v in os.environ.items() if k.startswith("NOTIFY_")}, needs=WORKER_NEEDS)
    security = replace(settings.kafka_security, tokens=unsigned(os.environ["TOKEN_USER"], seconds=float(os.environ["TOKEN_SECONDS"])))
    return build_app(replace(settings, kafka_security=security))


if __name__ == "__main__":
    make().main()
