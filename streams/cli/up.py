"""`notify up`: the whole system on this machine. Kafka, registry, database, mail server, topics, schemas, workers, and samples to look at.

Everything it starts is its child and ends with it. Whoever dies is started again, visibly; Ctrl-C stops all in order, the
workers first, and a second Ctrl-C kills at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Final

import click
import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from streams import provisioning
from streams.cli import console, kafka
from streams.cli.context import remove_running, write_running
from streams.cli.errors import EXIT_FAILURE, EXIT_SETTINGS, CliError, explain
from streams.cli.provision import wanted
from streams.cli.samples import NOTIFIED, Played, load_people, prepare, publish
from streams.cli.steps import Steps
from streams.cli.trails import Trails, in_thread, succeeded
from streams.registry import Registry
from streams.roles import Role
from streams.settings import VARIABLES, Settings
from streams.tokens import issue
from streams.topology import all_topics

if TYPE_CHECKING:
    from streams.embedded.metrics_page import MetricsPage
    from streams.embedded.stack import Ports, Stack
    from streams.embedded.supervisor import Happening, Supervisor, WorkerProcess

DEFAULT_DATA_DIR: Final = Path("~/.local/share/flowmart-notify/up")
WEB_PORT: Final = 6066  # of the views; the other roles follow, then the page with everybody's metrics
SERVER_PORTS: Final = 6
ENDED_DEADLINE_SECONDS: Final = 60.0
WORKER_GRACE_SECONDS: Final = 4.0
SERVER_GRACE_SECONDS: Final = 4.5
TOKEN_LIFETIME_SECONDS: Final = 86_400
PLAIN_COLUMNS: Final = 120
WIDEST_COLUMNS: Final = 120
INTERRUPTED_EXIT_CODE: Final = 130
SAMPLE_USER: Final = "cust_10482"
OWN = frozenset(
    {
        "NOTIFY_KAFKA_BOOTSTRAP",
        "NOTIFY_REGISTRY_URL",
        "NOTIFY_SMTP_URL",
        "NOTIFY_PROVIDERS",
        "NOTIFY_PROVIDERS_FILE",
        "NOTIFY_POSTGRES_URL",
    }
)
NOT_PASSED_ON = frozenset(
    {
        *OWN,
        "NOTIFY_ROLE",
        "NOTIFY_WORKER_NAME",
        "NOTIFY_DATA_DIR",
        "NOTIFY_CACHE_DIR",
        "NOTIFY_WEB_HOST",
        "NOTIFY_WEB_PORT",
        "NOTIFY_WEB_URL",
    }
)
SERVERS: Final = {
    "kafka": "broker and controller",
    "registry": "of Avro schemas",
    "postgres": "PostgreSQL, for what is older than the inboxes",
    "mail": "a mail server and its inbox page",
    "simulators": "of an SMS carrier, Twilio, FCM, APNs and Web Push",
}
EPILOG = console.examples("notify up", "notify up --once --data-dir /tmp/try", "notify up --no-demo --free-ports --ready-file ready.json")


def up(  # noqa: PLR0913 - one parameter an option
    *,
    no_demo: Annotated[bool, typer.Option("--no-demo", help="Do not load the sample users and play the sample events.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Stop when the samples have ended: 0 if all went as it should, else 1.")] = False,
    data_dir: Annotated[Path, typer.Option(metavar="D", help="Where everything is kept from run to run.")] = DEFAULT_DATA_DIR,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="F", help="Written as JSON when all is ready: the addresses and a token. Removed at the end.")
    ] = None,
    port_base: Annotated[int | None, typer.Option(metavar="N", min=1024, max=65_500, help="Listen on N, N+1 … N+16.")] = None,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Listen on any free ports; the same next time if still free.")] = False,
) -> None:
    """Run the whole system on this machine until Ctrl-C: Kafka, registry, mail server and the workers of every role.

    The sample events are played first, and the trail of every notification is printed as it ends, also of those that
    you cause meanwhile. Each play has new ids, so a second run on the same data shows new notifications.
    """
    if port_base is not None and free_ports:
        raise typer.BadParameter("is of no use together with --port-base", param_hint="--free-ports")
    try:
        from streams.embedded import stack  # noqa: F401 - an optional extra
    except ImportError as error:
        raise CliError(
            f"`notify up` needs the embedded stack, but {error.name} is missing: pip install 'flowmart-notifications[embedded]'",
            exit_code=EXIT_SETTINGS,
        ) from error
    options = Options(
        is_demo=not no_demo,
        is_once=once,
        data_dir=data_dir.expanduser().absolute(),
        ready_file=ready_file.absolute() if ready_file else None,
        port_base=port_base,
        is_free=free_ports,
        environ=dict(os.environ),
    )
    out = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_COLUMNS)
    run = Up(options, out)
    code = asyncio.run(run.run())
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.daemon and thread.name == "notify-blocking" for thread in threading.enumerate()):
        os._exit(code)  # it waits for a broker that has stopped
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for."""

    is_demo: bool
    is_once: bool
    data_dir: Path
    ready_file: Path | None
    port_base: int | None
    is_free: bool
    environ: Mapping[str, str] = field(repr=False)

    def server_ports(self) -> Ports:
        """Return where the servers are to listen."""
        from streams.embedded.stack import DEFAULT_PORTS, Ports

        if self.is_free:
            return Ports.free()
        if self.port_base is None:
            return DEFAULT_PORTS
        base = self.port_base
        return Ports(kafka=base, controller=base + 1, registry=base + 2, smtp=base + 3, http=base + 4, postgres=base + 5)

    def first_web_port(self, own: Mapping[str, str]) -> int | None:
        """Return where the views are to listen; None: anywhere."""
        if self.is_free:
            return None
        return self.port_base + SERVER_PORTS if self.port_base is not None else int(own.get("NOTIFY_WEB_PORT") or WEB_PORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where everything is, as the ready file says it."""

    kafka: str
    registry: str
    web: str
    metrics: str
    smtp: str
    inbox: str
    token: str = field(repr=False)
    postgres: str = field(repr=False)
    roles: Mapping[Role, str]
    variables: Mapping[str, str] = field(repr=False)  # NOTIFY_*, for other commands

    def to_json(self) -> dict[str, object]:
        """Return what the ready file holds."""
        return {
            "kafka": self.kafka,
            "registry": self.registry,
            "web": self.web,
            "metrics": self.metrics,
            "mail": {"smtp": self.smtp, "http": self.inbox},
            "token": self.token,
            "postgres": self.postgres,
            "roles": {str(role): url for role, url in self.roles.items()},
        }


class Up:
    """One run, from the first port to the last process."""

    def __init__(self, options: Options, out: Console) -> None:
        self._options = options
        self._out = out
        self._began = time.monotonic()
        self._stack: Stack | None = None
        self._supervisor: Supervisor | None = None
        self._workers: list[WorkerProcess] = []
        self._metrics: MetricsPage | None = None
        self._main: asyncio.Task[int] | None = None
        self._is_interrupted = False
        self._is_ready = False

    async def run(self) -> int:
        """Return the exit code, with everything stopped."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(each, self._on_signal)
        main = self._main = asyncio.create_task(self._live(), name="up")
        try:
            await asyncio.wait({main})
        finally:
            await self._stop()
        return self._exit_code(main)

    def _exit_code(self, main: asyncio.Task[int]) -> int:
        if main.cancelled():
            is_wanted = self._is_ready and not self._options.is_once
            return 0 if is_wanted else INTERRUPTED_EXIT_CODE
        error = main.exception()
        if error is None:
            return main.result()
        return _explain(error)

    def _on_signal(self) -> None:
        if self._is_interrupted:
            self._kill()
        self._is_interrupted = True
        if self._main is not None:
            self._main.cancel()

    def _kill(self) -> None:
        """End everything, and this process, at once."""
        from streams.embedded.supervisor import kill_now

        kill_now([*self._workers, *(self._stack.servers if self._stack else [])])
        self._clean_up()
        with contextlib.suppress(OSError):
            sys.stdout.write("\nkilled\n")
            sys.stdout.flush()
        os._exit(INTERRUPTED_EXIT_CODE)

    def _clean_up(self) -> None:
        remove_running(environ=self._options.environ)
        if self._options.ready_file is not None:
            self._options.ready_file.unlink(missing_ok=True)

    async def _live(self) -> int:
        from streams.embedded.processes import told_when_full

        options = self._options
        own = {name: value for name, value in options.environ.items() if name.startswith("NOTIFY_")}
        Settings.from_env(own)  # says everything that is wrong with them, before anything starts
        if options.ready_file is not None:
            options.ready_file.unlink(missing_ok=True)  # of an earlier run
            if not options.ready_file.parent.is_dir():
                raise CliError(f"--ready-file: the folder {options.ready_file.parent} does not exist.", exit_code=EXIT_SETTINGS)
        if ignored := sorted(OWN & own.keys()):
            console.warn(f"{', '.join(ignored)}: not used here, since `notify up` brings its own.")
        with told_when_full("`notify up`", options.data_dir):
            settings, addresses = await self._start(own)
            self._announce(addresses)
        async with Trails(settings, addresses.web, self._show, width=min(WIDEST_COLUMNS, self._out.width)) as trails:
            code = 0
            if options.is_demo:
                code = await self._play(settings, trails)
            if options.is_once:
                return code
            self._print_addresses(settings, addresses)
            await asyncio.Event().wait()
        return code

    # ---- start

    async def _start(self, own: Mapping[str, str]) -> tuple[Settings, Addresses]:
        from streams.embedded.metrics_page import MetricsPage
        from streams.embedded.processes import LOOPBACK
        from streams.embedded.supervisor import GROUPS, Supervisor, WorkerProcess, settle_web_ports, start_all

        options = self._options
        self._show(Group("", Text.assemble(("FlowMart notifications", "bold"), (f"  data in {options.data_dir}", "dim")), ""))
        with Steps(self._out, [*SERVERS, "topics", "schemas", *GROUPS]) as steps:
            stack = await self._start_servers(steps)
            folder = options.data_dir / "workers"
            folder.mkdir(mode=0o700, exist_ok=True)
            ports = await settle_web_ports(folder, options.first_web_port(own))
            variables = _variables(options, own, stack, folder, ports.of_role[Role.VIEWS])
            settings = Settings.from_env(variables)
            steps.begin("topics", "comparing")
            steps.end("topics", await in_thread(partial(_ensure_topics, settings)))
            steps.begin("schemas", "registering")
            steps.end("schemas", await _register(settings))
            self._workers = [
                WorkerProcess(name, {role: ports.of_role[role] for role in roles}, folder=folder, variables=variables, env=options.environ)
                for name, roles in GROUPS.items()
            ]
            for worker in self._workers:
                steps.begin(worker.name, "joining, reading its tables")
            await start_all(self._workers, lambda server, _seconds: steps.end(server.name, ", ".join(GROUPS[server.name])))
        self._supervisor = Supervisor(self._on_happening)
        self._supervisor.keep([*self._workers, *stack.servers])
        self._metrics = MetricsPage(ports.of_metrics, ports.of_role)
        await self._metrics.start()
        return settings, Addresses(
            kafka=stack.kafka,
            registry=stack.registry,
            web=f"http://{LOOPBACK}:{ports.of_role[Role.VIEWS]}",
            metrics=self._metrics.url,
            smtp=stack.mail_smtp,
            inbox=stack.mail_http,
            token=issue(settings.token_key, user_id=None, lifetime_seconds=TOKEN_LIFETIME_SECONDS),
            postgres=stack.postgres,
            roles={role: f"http://{LOOPBACK}:{port}" for role, port in ports.of_role.items()},
            variables=variables,
        )

    async def _start_servers(self, steps: Steps) -> Stack:
        from streams.embedded.stack import start_stack

        def tell(component: str, message: str) -> None:
            if message.startswith("ready"):
                steps.end(component, SERVERS[component])
            else:
                steps.begin(component, message)

        options = self._options
        stack = await start_stack(
            options.data_dir,
            ports=options.server_ports(),
            progress=tell,
            simulators=True,
            warm_up=not options.is_once,
            has_short_life=options.is_once,
        )
        self._stack = stack
        for server in stack.servers:
            server.stop_grace_seconds = SERVER_GRACE_SECONDS
        return stack

    def _announce(self, addresses: Addresses) -> None:
        """Let commands and scripts find this run."""
        write_running(addresses.variables, addresses.web, environ=self._options.environ)
        path = self._options.ready_file
        if path is not None:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(addresses.to_json(), file, indent=2)
            temporary.replace(path)  # whoever waits for the file finds all of it
        self._is_ready = True

    # ---- what is shown

    def _show(self, what: RenderableType) -> None:
        try:
            self._out.print(what)
        except (OSError, SystemExit):  # whoever read our output has gone: `notify up | head`
            if self._main is not None:
                self._main.cancel()

    def _on_happening(self, happening: Happening) -> None:
        from streams.embedded.supervisor import Died, Filling, NotReturned, Returned

        match happening:
            case Filling():
                parts: tuple[str | tuple[str, str], ...] = (
                    ("! ", "bold yellow"),
                    console.safe(f"{happening.warning[0].upper()}{happening.warning[1:]}"),
                )
            case Died():
                parts = (
                    ("✗ ", "bold red"),
                    (happening.name, "bold"),
                    f" died ({happening.cause}); starting it again in {happening.delay_seconds:g} s",
                    *([("\n         " + console.safe(happening.explanation), "yellow")] if happening.explanation else []),
                )
            case Returned():
                parts = (("✓ ", "bold green"), (happening.name, "bold"), f" is back after {happening.seconds:.1f} s (pid {happening.pid})")
            case NotReturned():
                first = happening.reason.splitlines()[0]
                parts = (
                    ("✗ ", "bold red"),
                    (happening.name, "bold"),
                    f" did not come back: {console.safe(first)} Next try in {happening.delay_seconds:g} s",
                )
        self._show(Text.assemble(f"{time.strftime('%H:%M:%S')} ", *parts))

    def _print_addresses(self, settings: Settings, addresses: Addresses) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in (
            ("inbox", Text.assemble((addresses.inbox, "bold cyan"), (f"   as JSON {addresses.inbox}/api/messages", "dim"))),
            ("queries", Text.assemble((addresses.web, "bold cyan"), ("   the pages are listed there", "dim"))),
            ("metrics", Text.assemble((addresses.metrics, "bold cyan"), ("   of all roles", "dim"))),
            ("database", Text(addresses.postgres)),
            ("Kafka", Text.assemble(addresses.kafka, ("   schema registry ", "dim"), addresses.registry)),
            ("logs", Text(f"{settings.data_dir}/*.log")),
        ):
            table.add_row(label, value)
        self._show(Group("", Rule(Text("ready", style="bold green"), align="left", style="green"), Padding(table, (0, 0, 1, 2))))
        lines = [
            f"TOKEN={addresses.token}",
            f'curl -s -H "Authorization: Bearer $TOKEN" {addresses.web}/users/{SAMPLE_USER}/notifications',
            f"curl -s {addresses.inbox}/api/messages",
            f"curl -s {addresses.metrics}",
        ]
        self._show(Text("  To paste; the token holds 24 hours, `notify token` makes others:", style="dim"))
        for line in lines:
            self._out.print(line, soft_wrap=True, markup=False)
        self._show(
            Group(
                Text.assemble("\n  ", ("In another terminal: ", "dim"), f"notify user {SAMPLE_USER}", (" · ", "dim"), "notify send --help"),
                Text.assemble("  ", ("Ctrl-C stops everything; what is stored stays.", "dim"), "\n"),
            )
        )

    # ---- the samples

    async def _play(self, settings: Settings, trails: Trails) -> int:
        self._show(Group("", Rule(Text("samples", style="bold"), align="left", style="dim")))
        people = await in_thread(partial(load_people, settings))
        run = f"{int(time.time()):x}{token_hex(1)}"  # names this play in the ids of its events
        played = await in_thread(partial(prepare, settings, run))
        trails.watch(each.notification or each.raw for each in played)
        self._show(
            Text(
                f"{people.users} users' preferences stored, sealed; {people.watches} watches and {people.products} products stored; "
                f"{len(played)} payments, adjustments of stock and actions of users played as run {run}\n",
                style="dim",
            )
        )
        await in_thread(partial(publish, settings, played))
        began = time.monotonic()
        with self._out.status("", spinner="dots") if self._out.is_terminal else contextlib.nullcontext() as status:
            while time.monotonic() - began < ENDED_DEADLINE_SECONDS:
                if status is not None:
                    status.update(Text(f"{len(played) - len(trails.missing())} of {len(played)} have ended"))
                if await trails.all_ended(0.2):
                    break
        problems = list(_problems(played, trails))
        trails.forget()
        if not problems:
            notified = sum(each.notification is not None and each.outcome == NOTIFIED for each in played)
            dead = sum(each.notification is None for each in played)
            kinds = f"{notified} notified, {len(played) - notified - dead} without a rule, {dead} in dead"
            self._show(Text.assemble(("✓ ", "bold green"), f"All {len(played)} samples ended as they should: {kinds}."))
            return 0
        for problem in problems:
            self._show(Text.assemble(("✗ ", "bold red"), console.safe(problem)))
        return EXIT_FAILURE

    # ---- the end

    async def _stop(self) -> None:
        began = time.monotonic()
        self._clean_up()
        if self._stack is not None:
            self._show(Text("\nStopping: workers, then mail, database, registry and Kafka (Ctrl-C again kills)", style="dim"))
        if self._supervisor is not None:
            await self._supervisor.release()
        if self._metrics is not None:
            await self._metrics.stop()
        for worker in self._workers:
            worker.stop_grace_seconds = WORKER_GRACE_SECONDS
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        if self._stack is not None:
            await self._stack.stop()
            self._show(Text.assemble(("✓ ", "bold green"), f"stopped in {time.monotonic() - began:.1f} s"))


def _variables(options: Options, own: Mapping[str, str], stack: Stack, folder: Path, web_port: int) -> dict[str, str]:
    """Return the variables that describe the running system, for workers and for other commands."""
    from streams.embedded.keys import obtain_keys
    from streams.embedded.processes import LOOPBACK

    return {
        **{name: value for name, value in own.items() if name in VARIABLES.keys() - NOT_PASSED_ON},
        **obtain_keys(options.data_dir, own),
        "NOTIFY_KAFKA_BOOTSTRAP": stack.kafka,
        "NOTIFY_REGISTRY_URL": stack.registry,
        "NOTIFY_SMTP_URL": stack.mail_smtp,
        "NOTIFY_PROVIDERS_FILE": str(stack.providers_file),
        "NOTIFY_POSTGRES_URL": stack.postgres,
        "NOTIFY_PUBLIC_URL": f"http://{LOOPBACK}:{web_port}",
        "NOTIFY_DATA_DIR": str(folder),
        "NOTIFY_WEB_HOST": LOOPBACK,
        "NOTIFY_WEB_PORT": str(web_port),
    }


def _ensure_topics(settings: Settings) -> str:
    admin = kafka.admin(settings.cluster)
    changes = provisioning.plan(admin, wanted(settings))
    provisioning.apply(admin, changes)
    counts = {action: sum(change.action is action for change in changes) for action in provisioning.Action}
    done = [f"{counts[action]} {word}" for action, word in _DONE.items() if counts[action]]
    return f"{len(changes)}: {', '.join(done)}"


_DONE = {
    provisioning.Action.CREATE: "created",
    provisioning.Action.ALTER: "altered",
    provisioning.Action.KEEP: "as they should be",
}


async def _register(settings: Settings) -> str:
    registry = Registry(settings.registry_url, settings.data_dir / "schemas", settings.registry_security)
    try:
        await registry.codec(settings.env, all_topics())
    finally:
        await registry.close()
    return f"{sum(spec.schema is not None for spec in all_topics())} registered"


def _problems(played: list[Played], trails: Trails) -> Iterator[str]:
    """Yield a sentence for each sample that did not end as it should."""
    for each in played:
        if each.notification is None:
            if each.raw not in trails.dead:
                yield f"Sample {each.number} ({each.about}) names nobody, but is no dead letter."
            continue
        document = trails.ended.get(each.notification)
        if document is None:
            yield f"Sample {each.number} ({each.about}), notification {each.notification}: {trails.state_of(each.notification)}."
        elif each.outcome != NOTIFIED:
            if (found := (document.get("decision") or {}).get("outcome")) != each.outcome:
                yield f"Sample {each.number} ({each.about}), notification {each.notification}: {found} instead of {each.outcome}."
        elif not succeeded(document):
            yield f"Sample {each.number} ({each.about}), notification {each.notification}, did not reach everybody: see its trail."


def _explain(error: BaseException) -> int:
    """Say what went wrong, without a traceback unless one was asked for; return the exit code."""
    from streams.embedded.processes import PortInUseError, StackError

    context = click.get_current_context(silent=True)
    if context is not None and context.find_root().params.get("traceback"):
        raise error
    if isinstance(error, StackError):
        head, *tail = str(error).splitlines()
        console.fail([f"{head[0].upper()}{head[1:]}"])
        for line in tail:
            console.stderr().print(Text(f"  {console.safe(line)}", style="dim"))
        if isinstance(error, PortInUseError):
            console.stderr().print(Text("  --port-base N takes others, --free-ports any.", style="dim"))
        return EXIT_FAILURE
    explained = explain(error) if isinstance(error, Exception) else None
    if explained is None:
        explained = [f"{type(error).__name__}: {error}. `notify --traceback up` shows where it comes from."], EXIT_FAILURE
    console.fail(explained[0])
    return explained[1]
