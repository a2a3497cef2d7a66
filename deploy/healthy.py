# ruff: noqa: INP001 - a program, no package
"""Ends with 0 when the worker of this container is ready: the health check of the image.

A worker that has more siblings than there are partitions gets none, and is not ready: run no more workers than that.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4


def main() -> int:
    """Ask the worker; say why not."""
    url = f"http://127.0.0.1:{os.environ.get('NOTIFY_WEB_PORT') or 6066}/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            return 0 if answer.status == 200 else 1
    except urllib.error.HTTPError as error:
        sys.stdout.write(error.read(2_000).decode(errors="replace") + "\n")
    except OSError as error:
        sys.stdout.write(f"{url} does not answer: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
