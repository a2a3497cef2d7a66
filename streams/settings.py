"""What the environment says a worker is. One frozen dataclass; constructing it reads nothing by itself.

Every missing or malformed variable is reported at once, before anything connects.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

from agents.receipts import REFERENCE_SECONDS
from channels.config import ProviderConfig, parse_providers, parse_providers_file, smtp_provider
from channels.signing import parse_secret
from channels.subscriptions import Subscription, parse_subscriptions
from schemas.errors import SettingsError
from schemas.topics import Lane, Tier
from streams.mailbox import Mailbox, parse_mailbox
from streams.roles import Role
from streams.security import KafkaSecurity, Mechanism, Protocol, RegistrySecurity, Tls
from streams.topics import Count
from streams.transport.cluster import Cluster

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
MINIMUM_TOKEN_KEY_BYTES = 32
DEFAULT_TIERS_SECONDS: tuple[int, ...] = (5, 60, 600)
DEFAULT_LANE_SHARES: Mapping[Lane, float] = {Lane.CRITICAL: 0.5, Lane.NORMAL: 0.3, Lane.BULK: 0.2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Values of the NOTIFY_* variables; `docs/settings.md` is generated from the table below."""

    env: str
    role: Role | None
    kafka: str
    kafka_security: KafkaSecurity
    registry_url: str
    registry_security: RegistrySecurity
    seal_key: bytes = field(repr=False)
    token_key: bytes = field(repr=False)
    smtp_url: str = field(repr=False)  # may carry a password
    mail_from: str
    data_dir: Path
    web_host: str
    web_port: int
    web_url: str
    partitions: int
    inbound_partitions: int
    inventory_partitions: int
    replication: int
    worker_name: str | None
    dedupe_seconds: int
    reference_seconds: int
    session_timeout_seconds: float
    max_open_attempts: int
    low_stock_threshold: int
    retry_tiers_seconds: Mapping[Lane, tuple[int, ...]]
    dead_run_limit: int
    postgres_url: str = field(repr=False)  # may carry a password
    store_months: int
    posts_per_second: int
    providers: tuple[ProviderConfig, ...] = ()
    lane_shares: Mapping[Lane, float] = field(default_factory=lambda: dict(DEFAULT_LANE_SHARES))
    sms_countries: frozenset[str] | None = None
    bounces: Mailbox | None = None
    public_url: str = ""
    callback_url: str = ""
    callback_keys: tuple[bytes, ...] = field(default=(), repr=False)
    ses_topics: frozenset[str] = frozenset()
    webhooks: tuple[Subscription, ...] = ()

    @property
    def counts(self) -> Mapping[Count, int]:
        """How many partitions a topic has, by whose count it follows."""
        return {
            Count.USER: self.partitions,
            Count.INBOUND: self.inbound_partitions,
            Count.INVENTORY: self.inventory_partitions,
            Count.ONE: 1,
        }

    @property
    def cluster(self) -> Cluster:
        """How every client of this worker or command reaches Kafka."""
        return Cluster(bootstrap=self.kafka, security=self.kafka_security)

    @classmethod
    def from_env(cls, env: Mapping[str, str], *, needs: frozenset[str] = frozenset()) -> Settings:
        """Return the settings in `env`. `needs` names the variables that must be there (`WORKER_NEEDS`). Reads the files of TLS.

        Raises SettingsError with one sentence for each variable that is missing or malformed, or contradicts another.
        """
        problems: list[str] = []

        def read(name: str, parse: Callable[[str], T], default: T) -> T:
            text = env.get(name, "").strip()
            if not text:
                if name in needs:
                    problems.append(f"{name} is missing: {VARIABLES[name]}")
                return default
            try:
                return parse(text)
            except ValueError as error:
                # a password in a URL has its own variables, and is not shown where it does not belong
                shown = "its value" if name in SECRETS or ("@" in text and "://" in text) else repr(text)
                problems.append(f"{name}: {shown} {error}: {VARIABLES[name]}")
                return default

        def tls(prefix: str) -> Tls:
            return Tls(
                ca_file=read(f"{prefix}CA_FILE", _path, None),
                certificate_file=read(f"{prefix}CERTIFICATE_FILE", _path, None),
                key_file=read(f"{prefix}KEY_FILE", _path, None),
                key_password=read(f"{prefix}KEY_PASSWORD", str, None),
            )

        role = read("NOTIFY_ROLE", _role, None)
        if role is not None and role.lane is not None:
            needs = needs if env.get("NOTIFY_PROVIDERS") or env.get("NOTIFY_PROVIDERS_FILE") else needs | {"NOTIFY_SMTP_URL"}
        if role is Role.STORE:
            needs = needs | {"NOTIFY_POSTGRES_URL"}
        public_url = read("NOTIFY_PUBLIC_URL", _http_url, "")
        settings = cls(
            env=read("NOTIFY_ENV", _word, "dev"),
            role=role,
            kafka=read("NOTIFY_KAFKA_BOOTSTRAP", _servers, ""),
            kafka_security=KafkaSecurity(
                protocol=read("NOTIFY_KAFKA_SECURITY_PROTOCOL", _one_of(Protocol), Protocol.PLAINTEXT),
                mechanism=read("NOTIFY_KAFKA_SASL_MECHANISM", _one_of(Mechanism), None),
                user=read("NOTIFY_KAFKA_USER", str, None),
                password=read("NOTIFY_KAFKA_PASSWORD", str, None),
                region=read("NOTIFY_KAFKA_REGION", _word, None),
                tls=tls("NOTIFY_KAFKA_"),
            ),
            registry_url=read("NOTIFY_REGISTRY_URL", _registry_url, ""),
            registry_security=RegistrySecurity(
                user=read("NOTIFY_REGISTRY_USER", str, None),
                password=read("NOTIFY_REGISTRY_PASSWORD", str, None),
                tls=tls("NOTIFY_REGISTRY_"),
            ),
            seal_key=read("NOTIFY_SEAL_KEY", _key_of_32_bytes, b""),
            token_key=read("NOTIFY_TOKEN_KEY", _token_key, b""),
            smtp_url=read("NOTIFY_SMTP_URL", _smtp_url, ""),
            mail_from=read("NOTIFY_MAIL_FROM", _mailbox, "FlowMart <notifications@flowmart.example>"),
            data_dir=read("NOTIFY_DATA_DIR", _path, Path("~/.local/share/flowmart-notify").expanduser()),
            web_host=read("NOTIFY_WEB_HOST", str, "127.0.0.1"),
            web_port=read("NOTIFY_WEB_PORT", _between(1, 65535), 6066),
            web_url=read("NOTIFY_WEB_URL", _http_url, ""),
            partitions=read("NOTIFY_PARTITIONS", _between(1, 10_000), 4),
            inbound_partitions=read("NOTIFY_INBOUND_PARTITIONS", _between(1, 10_000), 4),
            inventory_partitions=read("NOTIFY_INVENTORY_PARTITIONS", _between(1, 10_000), 4),
            replication=read("NOTIFY_REPLICATION", _between(1, 9), 1),
            worker_name=read("NOTIFY_WORKER_NAME", _word, None),
            dedupe_seconds=read("NOTIFY_DEDUPE_DAYS", _days, 7 * 86_400),
            reference_seconds=read("NOTIFY_REFERENCE_DAYS", _days, REFERENCE_SECONDS),
            session_timeout_seconds=read("NOTIFY_SESSION_TIMEOUT_SECONDS", _between(6, 300), 10),
            max_open_attempts=read("NOTIFY_MAX_OPEN_ATTEMPTS", _between(1, 1_000), 32),
            low_stock_threshold=read("NOTIFY_LOW_STOCK_THRESHOLD", _between(0, 1_000_000), 10),
            retry_tiers_seconds=read("NOTIFY_RETRY_TIERS", _tiers, dict.fromkeys(Lane, DEFAULT_TIERS_SECONDS)),
            dead_run_limit=read("NOTIFY_DEAD_RUN_LIMIT", _between(0, 1_000_000), 200),
            postgres_url=read("NOTIFY_POSTGRES_URL", _postgres_url, ""),
            store_months=read("NOTIFY_STORE_MONTHS", _between(1, 1_200), 13),
            posts_per_second=read("NOTIFY_POSTS_PER_SECOND", _between(1, 1_000_000), 50),
            providers=_providers(env, problems),
            lane_shares=read("NOTIFY_LANE_SHARES", _lane_shares, DEFAULT_LANE_SHARES),
            sms_countries=read("NOTIFY_SMS_COUNTRIES", _countries, None),
            bounces=read("NOTIFY_BOUNCES_URL", parse_mailbox, None),
            public_url=public_url,
            callback_url=read("NOTIFY_CALLBACK_URL", _http_url, public_url),
            callback_keys=read("NOTIFY_CALLBACK_SECRETS", _callback_keys, ()),
            ses_topics=read("NOTIFY_SES_TOPICS", _ses_topics, frozenset()),
            webhooks=_webhooks(env, problems),
        )
        problems += [
            f"NOTIFY_WEBHOOKS_FILE: {name} is the name of a provider too"
            for name in sorted({each.name for each in settings.webhooks} & {each.name for each in settings.providers})
        ]
        problems += _contradictions(settings, {problem.partition(" ")[0].rstrip(":") for problem in problems})
        unknown = sorted(name for name in env if name.startswith("NOTIFY_") and name not in VARIABLES)
        problems += [f"{name} is not a setting; the settings are in docs/settings.md" for name in unknown]
        if problems:
            raise SettingsError(problems)
        return settings


def _contradictions(settings: Settings, named: set[str]) -> Iterator[str]:
    """Yield what does not go together. Not where a value (one of `named`) could not be read: the mistake would be told twice."""
    if not any(name.startswith("NOTIFY_KAFKA_") for name in named - {"NOTIFY_KAFKA_BOOTSTRAP"}):
        yield from settings.kafka_security.problems()
    if not any(name.startswith("NOTIFY_REGISTRY_") for name in named):
        yield from settings.registry_security.problems(settings.registry_url)


VARIABLES: Mapping[str, str] = {
    "NOTIFY_ENV": "the environment in topic names, letters, digits and hyphens; default dev",
    "NOTIFY_ROLE": f"the role of this worker: {', '.join(Role)}",
    "NOTIFY_KAFKA_BOOTSTRAP": "Kafka's bootstrap servers, such as kafka-1:9092,kafka-2:9092",
    "NOTIFY_KAFKA_SECURITY_PROTOCOL": f"how connections to Kafka are protected: {', '.join(Protocol)}; default PLAINTEXT",
    "NOTIFY_KAFKA_SASL_MECHANISM": f"how clients name themselves to Kafka: {', '.join(Mechanism)}; for the protocols with SASL",
    "NOTIFY_KAFKA_USER": "the name, for PLAIN and SCRAM",
    "NOTIFY_KAFKA_PASSWORD": "its password; secret",
    "NOTIFY_KAFKA_REGION": "the region of an Amazon MSK cluster, such as eu-west-1; for AWS_MSK_IAM",
    "NOTIFY_KAFKA_CA_FILE": "the authorities that may sign the brokers' certificates, in PEM; default: the machine's own",
    "NOTIFY_KAFKA_CERTIFICATE_FILE": "the certificate that is shown to the brokers (mutual TLS), in PEM",
    "NOTIFY_KAFKA_KEY_FILE": "its private key, in PEM",
    "NOTIFY_KAFKA_KEY_PASSWORD": "what opens the private key; secret",
    "NOTIFY_REGISTRY_URL": "the schema registry, such as http://registry:8081",
    "NOTIFY_REGISTRY_USER": "the name for the registry's basic authentication; default: none",
    "NOTIFY_REGISTRY_PASSWORD": "its password; secret",
    "NOTIFY_REGISTRY_CA_FILE": "the authorities that may sign the registry's certificate, in PEM; default: the machine's own",
    "NOTIFY_REGISTRY_CERTIFICATE_FILE": "the certificate that is shown to the registry (mutual TLS), in PEM",
    "NOTIFY_REGISTRY_KEY_FILE": "its private key, in PEM",
    "NOTIFY_REGISTRY_KEY_PASSWORD": "what opens the private key; secret",
    "NOTIFY_SEAL_KEY": "32 bytes in base64 that wrap the users' keys; secret, the same for all workers",
    "NOTIFY_TOKEN_KEY": "at least 32 bytes in base64 that sign bearer tokens, links to unsubscribe and return paths; secret, alike for all",
    "NOTIFY_SMTP_URL": "the mail server: smtp://, smtp+starttls:// or smtps://[user:password@]host:port; secret; senders need it",
    "NOTIFY_MAIL_FROM": "the sender of mails, a mailbox such as FlowMart <notifications@flowmart.example>",
    "NOTIFY_DATA_DIR": "a folder for what may be lost: the cache of schemas; default ~/.local/share/flowmart-notify",
    "NOTIFY_WEB_HOST": "the address that queries, health and metrics listen on; default 127.0.0.1",
    "NOTIFY_WEB_PORT": "their port; default 6066",
    "NOTIFY_WEB_URL": "where other workers reach this one's web; default http://{NOTIFY_WEB_HOST}:{NOTIFY_WEB_PORT}",
    "NOTIFY_PARTITIONS": "partitions of every topic keyed by user; default 4, in production 24",
    "NOTIFY_INBOUND_PARTITIONS": "partitions of the payments topic; default 4",
    "NOTIFY_INVENTORY_PARTITIONS": "partitions of the inventory topic, and of what is keyed by product; default 4",
    "NOTIFY_REPLICATION": "replicas of the topics that `notify topics ensure` makes; default 1, in production 3",
    "NOTIFY_WORKER_NAME": "a stable, unique name of this worker (static group membership); default: none",
    "NOTIFY_DEDUPE_DAYS": "how long an event sent again is known, in days such as 7 or 0.5; default 7",
    "NOTIFY_REFERENCE_DAYS": f"how long a bounce or another report finds its delivery, in days; default {REFERENCE_SECONDS // 86_400}",
    "NOTIFY_SESSION_TIMEOUT_SECONDS": "silence after which a worker's partitions go to others; default 10, at least 6",
    "NOTIFY_MAX_OPEN_ATTEMPTS": "calls to one provider that a worker has open at once: the bound on duplicates of a crash; default 32",
    "NOTIFY_LOW_STOCK_THRESHOLD": "at or below how many a product's stock is low, where `products` does not say; default 10",
    "NOTIFY_RETRY_TIERS": "seconds of the tiers: 5,60,600 for all lanes, or by lane critical=1,10,60;bulk=30,300,3600; default 5,60,600",
    "NOTIFY_DEAD_RUN_LIMIT": "so many dead letters in a row, or more than half of 1000 records, halt an input; 0: never; default 200",
    "NOTIFY_POSTGRES_URL": "the database, postgresql://user:password@host:port/name; secret; the store needs it, views page on with it",
    "NOTIFY_STORE_MONTHS": "how many months of notifications the database keeps, the current one included; default 13",
    "NOTIFY_POSTS_PER_SECOND": "requests and watches that a token may ask a views worker for in a second; default 50",
    "NOTIFY_PROVIDERS": "the providers of all channels, a URL each, between spaces (docs/howto/providers.md); secret",
    "NOTIFY_PROVIDERS_FILE": "a TOML file with more of them, a table [providers.NAME] each",
    "NOTIFY_LANE_SHARES": "what part of each provider's quota a lane may use, in percent: critical,normal,bulk; default 50,30,20",
    "NOTIFY_SMS_COUNTRIES": "countries whose numbers may be sent SMS, such as DE,AT,CH; default: all",
    "NOTIFY_PUBLIC_URL": "what recipients and providers reach the web of views by: links to unsubscribe begin so; default: no links",
    "NOTIFY_CALLBACK_URL": "what providers reach the web of views by, for their reports; default: NOTIFY_PUBLIC_URL",
    "NOTIFY_CALLBACK_SECRETS": "secrets (whsec_…) that sign reports to /callbacks/receipts, between spaces; secret; default: none",
    "NOTIFY_SES_TOPICS": "topics of Amazon SNS that may report on mails (arn:aws:sns:…), between spaces; default: none",
    "NOTIFY_WEBHOOKS_FILE": "a TOML file of those who are told of status changes, a table [webhooks.NAME] each (docs/howto/webhooks.md)",
    "NOTIFY_BOUNCES_URL": "the mailbox of bounces, imaps://user:password@host/INBOX (docs/howto/email.md); secret; signals reads it",
    "NOTIFY_CACHE_DIR": "where `notify up` keeps downloads; default ~/.cache/flowmart-notify",
}
SECRETS = frozenset(
    {
        "NOTIFY_SEAL_KEY",
        "NOTIFY_TOKEN_KEY",
        "NOTIFY_SMTP_URL",
        "NOTIFY_PROVIDERS",
        "NOTIFY_CALLBACK_SECRETS",
        "NOTIFY_BOUNCES_URL",
        "NOTIFY_POSTGRES_URL",
        "NOTIFY_KAFKA_PASSWORD",
        "NOTIFY_KAFKA_KEY_PASSWORD",
        "NOTIFY_REGISTRY_PASSWORD",
        "NOTIFY_REGISTRY_KEY_PASSWORD",
    }
)
CLIENT_NEEDS = frozenset({"NOTIFY_KAFKA_BOOTSTRAP", "NOTIFY_REGISTRY_URL", "NOTIFY_SEAL_KEY", "NOTIFY_TOKEN_KEY"})
WORKER_NEEDS = CLIENT_NEEDS | {"NOTIFY_ROLE"}


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise ValueError("is not a role") from None


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}", text):
        raise ValueError("is not a word of letters, digits and hyphens")
    return text


def _servers(text: str) -> str:
    for server in text.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"has {server.strip()!r}, which is not host:port")
    return ",".join(server.strip() for server in text.split(","))


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        # its own message quotes the URL, and so a password
        raise ValueError("is not a URL") from None


def _http_url(text: str) -> str:
    parts = _split(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("is not an http or https URL")
    return text.rstrip("/")


def _registry_url(text: str) -> str:
    url = _http_url(text)
    if _split(text).username is not None:
        raise ValueError("has a name or password in it, which belong into NOTIFY_REGISTRY_USER and NOTIFY_REGISTRY_PASSWORD")
    return url


def _one_of(kind: type[E]) -> Callable[[str], E]:
    def parse(text: str) -> E:
        try:
            return kind(text.upper())
        except ValueError:
            raise ValueError(f"is not one of {', '.join(kind)}") from None

    return parse


def _providers(env: Mapping[str, str], problems: list[str]) -> tuple[ProviderConfig, ...]:
    """Return the providers that NOTIFY_SMTP_URL, NOTIFY_PROVIDERS and NOTIFY_PROVIDERS_FILE describe, together."""
    found: list[ProviderConfig] = []
    plain, urls, file = (env.get(name, "").strip() for name in ("NOTIFY_SMTP_URL", "NOTIFY_PROVIDERS", "NOTIFY_PROVIDERS_FILE"))
    try:
        if plain and _is_smtp_url(plain):  # else the problem is named where it is read
            found.append(smtp_provider(plain))
        found += parse_providers(urls, env)
        if file:
            found += parse_providers_file(Path(file).expanduser().read_text("utf-8"), env)
    except SettingsError as error:
        problems += [f"NOTIFY_PROVIDERS: {problem}" for problem in error.problems]
    except (OSError, ValueError, RuntimeError) as error:
        problems.append(f"NOTIFY_PROVIDERS_FILE: {file!r} cannot be read: {type(error).__name__}")
    problems += [f"NOTIFY_PROVIDERS: there are two providers called {name}" for name in _doubled(each.name for each in found)]
    return tuple(found)


def _webhooks(env: Mapping[str, str], problems: list[str]) -> tuple[Subscription, ...]:
    """Return the subscriptions in NOTIFY_WEBHOOKS_FILE."""
    file = env.get("NOTIFY_WEBHOOKS_FILE", "").strip()
    if not file:
        return ()
    try:
        return parse_subscriptions(Path(file).expanduser().read_text("utf-8"), env)
    except SettingsError as error:
        problems += [f"NOTIFY_WEBHOOKS_FILE: {problem}" for problem in error.problems]
    except (OSError, ValueError, RuntimeError) as error:
        problems.append(f"NOTIFY_WEBHOOKS_FILE: {file!r} cannot be read: {type(error).__name__}")
    return ()


def _doubled(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _is_smtp_url(text: str) -> bool:
    try:
        _smtp_url(text)
    except ValueError:
        return False
    return True


def _lane_shares(text: str) -> Mapping[Lane, float]:
    """Parse percents of the lanes, such as 50,30,20."""
    try:
        shares = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(Lane) or any(share <= 0 for share in shares) or sum(shares) > 1.000001:
        raise ValueError("is not three percents above 0 that add up to 100 at most")
    return dict(zip(Lane, shares, strict=True))


def _countries(text: str) -> frozenset[str]:
    countries = {part.strip().upper() for part in text.split(",")}
    if not all(re.fullmatch(r"[A-Z]{2}", country) for country in countries):
        raise ValueError("is not a list of two-letter countries")
    return frozenset(countries)


def _callback_keys(text: str) -> tuple[bytes, ...]:
    try:
        return tuple(parse_secret(each) for each in text.split())
    except ValueError as error:
        raise ValueError(f"has one that {error}") from None


def _ses_topics(text: str) -> frozenset[str]:
    topics = frozenset(text.split())
    if not all(re.fullmatch(r"arn:aws[a-z-]*:sns:[a-z0-9-]+:\d{12}:[A-Za-z0-9_.-]{1,256}", topic) for topic in topics):
        raise ValueError("is not a list of topics such as arn:aws:sns:eu-west-1:123456789012:ses-events")
    return topics


def _smtp_url(text: str) -> str:
    parts = _split(text)
    if parts.scheme not in {"smtp", "smtps", "smtp+starttls"} or not parts.hostname:
        raise ValueError("is not an smtp URL")
    return text


def _postgres_url(text: str) -> str:
    parts = _split(text)
    if parts.scheme != "postgresql" or not parts.hostname:
        raise ValueError("is not a postgresql:// URL")
    return text


def _tiers(text: str) -> dict[Lane, tuple[int, ...]]:
    """Parse `5,60,600` for all lanes, or `critical=1,10,60;bulk=30,300,3600` for some."""
    found: dict[Lane, tuple[int, ...]] = dict.fromkeys(Lane, DEFAULT_TIERS_SECONDS)
    for part in text.split(";"):
        lane, equals, numbers = part.rpartition("=")
        seconds = tuple(int(number) if number.strip().isdigit() else 0 for number in numbers.split(","))
        if len(seconds) != len(Tier) or any(a >= b for a, b in itertools.pairwise((0, *seconds))):
            raise ValueError(f"has {numbers.strip()!r}, which is not {len(Tier)} rising numbers of seconds")
        if equals and lane.strip() not in set(Lane):
            raise ValueError(f"has {lane.strip()!r}, which is not a lane")
        found |= {Lane(lane.strip()): seconds} if equals else dict.fromkeys(Lane, seconds)
    return found


def _days(text: str) -> int:
    """Parse a number of days, from a minute to a year, into seconds."""
    try:
        seconds = round(86_400 * float(text))
    except (ValueError, OverflowError):
        raise ValueError("is not a number of days") from None
    if not 60 <= seconds <= 365 * 86_400:
        raise ValueError("is not from 0.001 to 365 days")
    return seconds


def _mailbox(text: str) -> str:
    if "@" not in text or any(ord(c) < 32 for c in text):
        raise ValueError("is not a mailbox")
    return text


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("is not base64") from None


def _key_of_32_bytes(text: str) -> bytes:
    key = _base64(text)
    if len(key) != 32:
        raise ValueError(f"has {len(key)} bytes, not 32")
    return key


def _token_key(text: str) -> bytes:
    key = _base64(text)
    if len(key) < MINIMUM_TOKEN_KEY_BYTES:
        raise ValueError(f"has {len(key)} bytes, fewer than {MINIMUM_TOKEN_KEY_BYTES}")
    return key


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("names a home folder that cannot be found") from None


def _between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
            raise ValueError(f"is not a whole number from {low} to {high}")
        return int(text)

    return parse
