# ruff: noqa: INP001 - a program, no package
"""Makes a checkout importable in this interpreter's environment, with its command `notify`: what `pip install -e .` does.

pip would download the build backend, which the lock does not hold, to write these two files.
"""

from __future__ import annotations

import signal
import sys
import sysconfig
from pathlib import Path

# the interpreter's path may hold spaces or be longer than a #! line may be: the shell starts it
LAUNCHER = """\
#!/bin/sh
'''exec' "{python}" -P "$0" "$@"
' '''
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported: no traceback
from streams.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def main(root: Path) -> None:
    """Write the path file and the command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not (root / "streams" / "cli" / "__init__.py").exists():
        raise SystemExit(f"{root} is no checkout of this project")
    (Path(sysconfig.get_path("purelib")) / "flowmart-notifications.pth").write_text(f"{root}\n", encoding="utf-8")
    command = Path(sysconfig.get_path("scripts")) / "notify"
    command.write_text(LAUNCHER.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
