"""Schemas for a command: registers those it writes with, learns those it meets. Blocking, around the async registry."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TypeVar

from schemas.codec import Codec, schema_id_of
from schemas.errors import UnknownSchemaError
from schemas.messages import Message
from streams.registry import Registry
from streams.settings import Settings
from streams.topics import TopicSpec

M = TypeVar("M", bound=Message)


class Wire:
    """Encodes and decodes with the registry at hand."""

    def __init__(self, settings: Settings) -> None:
        self._runner = asyncio.Runner()
        self._env = settings.env
        self._registry = Registry(settings.registry_url, settings.data_dir / "schemas", settings.registry_security)
        self._codec = Codec({}, self._registry.schemas)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._runner.run(self._registry.close())
        self._runner.close()

    def register(self, subject: str, text: str) -> int:
        """Register a foreign schema, or find it registered, and return its id."""
        return self._runner.run(self._registry.register(subject, text))

    def codec(self, specs: list[TopicSpec]) -> Codec:
        """Return a codec that writes the messages of `specs`."""
        return self._runner.run(self._registry.codec(self._env, specs))

    def decode(self, raw: bytes | None, kind: type[M]) -> M:
        """Return the message of type `kind` in `raw`; asks the registry for a schema not met before."""
        try:
            return self._codec.decode(raw, kind)
        except UnknownSchemaError as error:
            self._runner.run(self._registry.learn(error.schema_id))
            return self._codec.decode(raw, kind)

    def decode_any(self, raw: bytes | None) -> Mapping[str, object]:
        """Return the record in `raw` as its writer's schema says."""
        self._runner.run(self._registry.learn(schema_id_of(raw)))
        return self._codec.decode_foreign(raw)
