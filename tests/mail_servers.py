"""Mail servers that are not ours, for tests of what we send them and read from them: GreenMail and Postfix.

Postfix comes with `make setup-system`; GreenMail is one file, downloaded once and checked like the embedded stack's.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from streams.embedded import artifacts
from streams.embedded.artifacts import Artifact
from streams.embedded.processes import choose_port
from tests.harness import wait_for

GREENMAIL = Artifact(
    sha256="21b361e46e8ffe83afe7915a2b01231c4a163c8d0fa5de607e32ed19732d908d",
    size_bytes=10_975_814,
    coordinate="com.icegreen:greenmail-standalone:2.1.13:jar",
)
POSTFIX_PROGRAM = Path("/usr/sbin/postfix")
DEADLINE_SECONDS = 60.0
# service, type, private, unprivileged, chroot, wakeup, processes, program: as Debian ships it, without chroots
MASTER = """\
127.0.0.1:PORT inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 1 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


@dataclass(frozen=True, slots=True)
class GreenMail:
    """A running GreenMail. It makes a mailbox for each address that it gets mail for; its password is the address."""

    smtp: int
    imap: int
    imaps: int


@contextmanager
def greenmail(keystore: Path | None = None, password: str = "", *, users: str = "") -> Iterator[GreenMail]:
    """Run GreenMail on free ports. `keystore`: its certificate and key for TLS, in PKCS #12; `users`: local:password@domain, by comma."""
    folder = artifacts.default_cache_dir(os.environ) / "tests"
    (jar,) = artifacts.download([GREENMAIL], folder, progress=lambda _text: None, cancelled=threading.Event())
    found = GreenMail(choose_port(), choose_port(), choose_port())
    options = [f"-Dgreenmail.{name}.hostname=127.0.0.1" for name in ("smtp", "imap", "imaps")]
    options += [f"-Dgreenmail.{name}.port={getattr(found, name)}" for name in ("smtp", "imap", "imaps")]
    # after two seconds, which a busy machine may need, it would go on without its users
    options.append("-Dgreenmail.startup.timeout=60000")
    if users:
        options += [f"-Dgreenmail.users={users}", "-Dgreenmail.users.login=email"]
    if keystore is not None:
        options += [f"-Dgreenmail.tls.keystore.file={keystore}", f"-Dgreenmail.tls.keystore.password={password}"]
    command = [str(artifacts.java()), "-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dgreenmail.auth.disabled", *options]
    with tempfile.TemporaryFile() as log, subprocess.Popen([*command, "-jar", str(jar)], stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: _answers(found.smtp) or process.poll() is not None, seconds=DEADLINE_SECONDS, what="GreenMail listening")
            assert process.poll() is None, f"GreenMail ended: {_tail(log)}"
            yield found
        finally:
            process.terminate()
            process.wait(10)
            print(_tail(log))  # shown where a test failed


@contextmanager
def postfix(*, relay_to: int, aliases: dict[str, str]) -> Iterator[int]:
    """Run a Postfix of its own on a free port and yield the port. It relays to 127.0.0.1:`relay_to`.

    `aliases`: by a regular expression, to whom mail for such addresses goes.
    """
    if not POSTFIX_PROGRAM.exists():
        pytest.fail("Postfix is not installed: run `make setup-system` as root")
    if os.geteuid() != 0:
        pytest.fail("Postfix has to be started by root")
    # not below pytest's folder, which Postfix's own user may not enter
    folder = Path(tempfile.mkdtemp(prefix="postfix-"))
    folder.chmod(0o755)
    try:
        port = _configure(folder, relay_to, aliases)
        with subprocess.Popen(
            [str(POSTFIX_PROGRAM), "-c", str(folder / "etc"), "start-fg"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                wait_for(lambda: _answers(port) or process.poll() is not None, seconds=DEADLINE_SECONDS, what="Postfix listening")
                assert process.poll() is None, f"Postfix ended: {process.stdout.read() if process.stdout else ''!r}"
                yield port
            finally:
                # ending `start-fg` alone would leave the master behind, which is no child of ours
                pid_file = folder / "spool" / "pid" / "master.pid"
                master = pid_file.read_text().strip() if pid_file.exists() else "none"
                subprocess.run([str(POSTFIX_PROGRAM), "-c", str(folder / "etc"), "abort"], check=False, capture_output=True, timeout=30)
                process.terminate()
                process.wait(10)
                wait_for(lambda: not Path("/proc", master).exists(), seconds=10, what="Postfix ended")
                if (folder / "log").exists():
                    print((folder / "log").read_text()[-4000:])  # shown where a test failed
    finally:
        shutil.rmtree(folder)


def _answers(port: int) -> bool:
    try:
        with smtplib.SMTP("127.0.0.1", port, timeout=5) as smtp:
            return smtp.noop()[0] == 250
    except (OSError, smtplib.SMTPException):
        return False


def _tail(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]  # a file
    return str(log.read()[-2000:])  # type: ignore[attr-defined]


def _configure(folder: Path, relay_to: int, aliases: dict[str, str]) -> int:
    port = choose_port()
    etc, spool, data = (folder / name for name in ("etc", "spool", "data"))
    for each in (etc, spool, data):
        each.mkdir()
    shutil.chown(data, "postfix")
    (etc / "aliases").write_text("".join(f"/^{pattern}$/ {address}\n" for pattern, address in aliases.items()))
    (etc / "main.cf").write_text(f"""\
compatibility_level = 3.6
queue_directory = {spool}
data_directory = {data}
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = postfix
setgid_group = postdrop
myhostname = relay.example
mydestination =
alias_maps =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
smtp_dns_support_level = disabled
smtp_host_lookup = native
relayhost = [127.0.0.1]:{relay_to}
virtual_alias_maps = regexp:{etc}/aliases
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 1s
smtp_destination_concurrency_failed_cohort_limit = 0
default_destination_concurrency_failed_cohort_limit = 0
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
smtpd_tls_security_level = none
smtp_tls_security_level = none
""")
    (etc / "master.cf").write_text(MASTER.replace("PORT", str(port)))
    return port
