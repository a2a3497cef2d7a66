"""Client of the schema registry (Confluent's REST API) with a cache on disk, so that known schemas survive its outages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import fastavro

from schemas.codec import Codec, Schema, schema_text
from schemas.errors import RegistryUnavailableError, SettingsError, UndecodableError, UnknownSchemaError
from streams.security import RegistrySecurity
from streams.topics import TopicSpec, physical

TIMEOUT_SECONDS = 5.0
# after a failed call the registry is not asked again for so long: one outage must not cost a time-out a batch
PAUSE_AFTER_FAILURE_SECONDS = 1.0
NOT_FOUND_REMEMBERED_SECONDS = 30.0
NO_SECURITY = RegistrySecurity()


def connection_options(security: RegistrySecurity) -> dict[str, Any]:
    """Return how an aiohttp session proves who we are and whom it trusts. Called in the loop that the session runs in."""
    named = base64.b64encode(f"{security.user}:{security.password}".encode()).decode()
    headers = {} if security.user is None else {"Authorization": f"Basic {named}"}
    return {"headers": headers, "connector": aiohttp.TCPConnector(ssl=security.tls.context())}


def refusal(problem: Exception | int, security: RegistrySecurity) -> str:
    """Return why the registry was of no use, with what to look at: an error of the connection, or a status."""
    who = "no name" if security.user is None else f"the name {security.user!r}"
    match problem:
        case 401:
            return f"the schema registry does not accept {who} (401): look at NOTIFY_REGISTRY_USER and NOTIFY_REGISTRY_PASSWORD"
        case 403:
            return f"the schema registry does not allow this to {who} (403): it needs to read and register schemas"
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(problem.certificate_error, "verify_message", "") or "its certificate is not trusted"
            where = "NOTIFY_REGISTRY_CA_FILE and the name in NOTIFY_REGISTRY_URL"
            return f"the schema registry's certificate is refused ({reason}): look at {where}"
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return "TLS with the schema registry failed: does NOTIFY_REGISTRY_URL name a port with TLS, and does it ask for a certificate?"
    return f"the schema registry does not answer: {type(problem).__name__}"


class Registry:
    """Looks schemas up by id and registers ours. One per worker; `schemas` is shared with the codec."""

    def __init__(self, url: str, cache_dir: Path, security: RegistrySecurity = NO_SECURITY) -> None:
        self.url = url.rstrip("/")
        self._security = security
        self.schemas: dict[int, Schema] = {}
        self._cache = cache_dir
        self._session: aiohttp.ClientSession | None = None
        self._date: str | None = None
        self._paused_until = 0.0
        self._not_found: dict[int, float] = {}
        self._refused: set[int] = set()  # no Avro schemas: the answer will not change
        self._load_cache()

    async def close(self) -> None:
        """Close connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def learn(self, schema_id: int) -> None:
        """Make schema `schema_id` known. Raises UnknownSchemaError (the registry says 404) or RegistryUnavailableError."""
        if schema_id in self.schemas or schema_id in self._refused:
            return
        if self._not_found.get(schema_id, 0.0) > time.monotonic():
            raise UnknownSchemaError(f"the registry has no schema {schema_id}", schema_id=schema_id)
        status, body = await self._call("GET", f"/schemas/ids/{schema_id}")
        if status == 404:
            self._not_found[schema_id] = time.monotonic() + NOT_FOUND_REMEMBERED_SECONDS
            raise UnknownSchemaError(f"the registry has no schema {schema_id}", schema_id=schema_id)
        if status != 200:
            raise RegistryUnavailableError(f"the registry answered {status} for schema {schema_id}")
        text = str(body["schema"])
        try:
            parsed = fastavro.parse_schema(json.loads(text), named_schemas={})
        except Exception as error:
            self._refused.add(schema_id)
            raise UndecodableError(f"schema {schema_id} is no Avro schema: {type(error).__name__}") from error
        self.schemas[schema_id] = parsed
        self._store(f"{schema_id}.avsc", text)

    def explain(self, schema_id: int) -> None:
        """Raise RegistryUnavailableError unless the registry said that it does not know `schema_id`."""
        if schema_id not in self._refused and self._not_found.get(schema_id, 0.0) <= time.monotonic():
            raise RegistryUnavailableError(f"the registry could not be asked for schema {schema_id}")

    async def register(self, subject: str, text: str) -> int:
        """Register a schema, or find it registered, and return its id. Raises RegistryUnavailableError.

        Raises SettingsError when it is incompatible with what is registered (409) or refused (422).
        """
        status, body = await self._call("POST", f"/subjects/{subject}/versions", {"schema": text, "schemaType": "AVRO"})
        if status in {409, 422}:
            problem = f"the registry refused the schema of {subject} ({status}): {body.get('message', '')}"
            raise SettingsError([problem])
        if status != 200:
            raise RegistryUnavailableError(f"the registry answered {status} when {subject} was registered")
        return int(body["id"])

    async def codec(self, env: str, specs: Sequence[TopicSpec]) -> Codec:
        """Return the codec for our own topics, their schemas registered; from the cache when the registry is away.

        Raises RegistryUnavailableError when it is away and these schemas were never registered from here.
        """
        written_as: dict[str, int] = {}
        for spec in specs:
            if spec.schema is None:
                continue
            subject, text = f"{physical(env, spec.name)}-value", schema_text(spec.schema)
            # a file each: workers that share the folder take no entry from each other
            stored = self._cache / f"{subject}.json"
            cached: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
            if (cached.get("schema"), cached.get("url")) == (text, self.url):
                schema_id = int(cached["id"])
            else:
                schema_id = await self.register(subject, text)
                self._store(stored.name, json.dumps({"schema": text, "url": self.url, "id": schema_id}))
            written_as[spec.schema] = schema_id
        return Codec(written_as, self.schemas)

    async def date(self) -> str | None:
        """Return what the registry says the date is, as HTTP writes it. Raises RegistryUnavailableError."""
        await self._call("GET", "/schemas/types")
        return self._date

    async def _call(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        if time.monotonic() < self._paused_until:
            raise RegistryUnavailableError("the schema registry did not answer a moment ago")
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, **connection_options(self._security))
        try:
            async with self._session.request(method, self.url + path, json=body) as answer:
                status = answer.status
                self._date = answer.headers.get("Date")
                content = await answer.json(content_type=None)
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            self._paused_until = time.monotonic() + PAUSE_AFTER_FAILURE_SECONDS
            raise RegistryUnavailableError(refusal(error, self._security)) from error
        if status in {401, 403}:
            raise RegistryUnavailableError(refusal(status, self._security))
        return status, content if isinstance(content, dict) else {}

    def _load_cache(self) -> None:
        # ids are the registry's: a cache filled by another registry would decode with the wrong schema
        owner = self._cache / "registry-url"
        with contextlib.suppress(OSError):
            self._cache.mkdir(parents=True, exist_ok=True)
            if owner.exists() and owner.read_text() != self.url:
                for file in self._cache.glob("*.avsc"):
                    file.unlink(missing_ok=True)
            owner.write_text(self.url)
            for file in self._cache.glob("*.avsc"):
                with contextlib.suppress(ValueError):
                    self.schemas[int(file.stem)] = fastavro.parse_schema(json.loads(file.read_text()), named_schemas={})

    def _store(self, name: str, text: str) -> None:
        # the cache is an aid: a full disk must not stop decoding
        with contextlib.suppress(OSError):
            temporary = self._cache / f".{name}.{os.getpid()}.{id(asyncio)}"
            temporary.write_text(text)
            temporary.replace(self._cache / name)
