"""The same security for Faust's group member, whose client is aiokafka."""

from __future__ import annotations

import asyncio

import faust
from aiokafka.abc import AbstractTokenProvider
from faust.types.auth import CredentialsT

from streams.security import KafkaSecurity, Mechanism, TokenSource


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka has no types
    """Hands tokens to aiokafka. Making one may ask Amazon, so it is done in a thread."""

    def __init__(self, tokens: TokenSource) -> None:
        self._tokens = tokens

    async def token(self) -> str:
        """Return a token that is valid now."""
        token, _ = await asyncio.get_running_loop().run_in_executor(None, self._tokens)
        return token


def credentials(security: KafkaSecurity) -> CredentialsT | None:
    """Return what Faust connects with; None: neither encrypted nor authenticated. Raises SettingsError: no signer for MSK."""
    context = security.tls.context() if security.protocol.has_tls else None
    if security.protocol.has_sasl and security.mechanism is Mechanism.AWS_MSK_IAM:
        return faust.OAuthCredentials(oauth_cb=TokenProvider(security.token_source()), ssl_context=context)
    if security.protocol.has_sasl:
        return faust.SASLCredentials(
            username=security.user, password=security.password, ssl_context=context, mechanism=str(security.mechanism)
        )
    return None if context is None else faust.SSLCredentials(context)
