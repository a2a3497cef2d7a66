"""Every error that this service raises on purpose.

    NotifyError
    ├── RetryableError                  may succeed later: requeue the same delivery with attempt + 1
    │   ├── ProviderUnavailableError    nobody answers at the provider: the partition waits, one delivery probes
    │   ├── ProviderThrottledError      the provider asked us to slow down: wait `retry_after_seconds`
    │   ├── ProviderRefusedError        this delivery was refused for now: it waits alone, others go on
    │   ├── DatabaseUnavailableError    PostgreSQL does not answer, or not now: the projection pauses
    │   └── RegistryUnavailableError    the schema registry could not be asked: park the record
    ├── PermanentError                  will never succeed: record the reason, do not retry
    │   ├── UndecodableError            the bytes are no message of ours
    │   ├── UnknownSchemaError          the registry does not know the writer's schema
    │   ├── InvalidEventError           decoded, but a field is absurd
    │   ├── UnroutableError             names no user, so nobody can be told
    │   ├── UnknownRuleError            asks for a rule that does not exist
    │   ├── VersionConflictError        a change based on a version that is no longer the stored one
    │   ├── RefusedValueError           PostgreSQL will never take what the record became
    │   ├── TooLargeError               what it became is larger than Kafka accepts
    │   ├── UnsealableError             sealed bytes that the user's key does not open
    │   ├── ExpiredError                past its latest useful moment
    │   ├── AttemptsExhaustedError      refused for now as often as its schedule allows
    │   ├── UnknownReferenceError       a provider's report on something that was never sent from here
    │   ├── TemplateError               a template cannot be rendered with this data
    │   ├── ProviderRejectedError       the provider will never take this delivery
    │   └── SettingsError               the environment does not describe a worker that can run
    └── SendUnknownError                the bytes left and no answer came: neither sent nor failed until reconciled

`SendUnknownError` is in neither branch by intent: retrying may double, giving up may lose; policy decides (docs/adr/0004).
"""

from __future__ import annotations

from schemas.status import Suppression


class NotifyError(Exception):
    """Root. Catches everything this service raises on purpose."""

    @property
    def reason(self) -> str:
        """The error's name on the wire and in metrics, such as `unroutable`. Bounded: one per class."""
        name = type(self).__name__.removesuffix("Error")
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


class RetryableError(NotifyError):
    """May succeed later. Requeue the same delivery with attempt + 1."""


class PermanentError(NotifyError):
    """Will never succeed. Record the reason; do not retry."""


class SendUnknownError(NotifyError):
    """The bytes left and no answer came. Record `unknown`; the channel's policy decides what follows."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class ProviderError(NotifyError):
    """What a provider answered. `code` is its own code, kept in the trail. Raised only as one of its subclasses."""

    def __init__(self, message: str, *, code: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class ProviderUnavailableError(ProviderError, RetryableError):
    """Nobody answers at the provider, and no byte of the message left. Wait; let one delivery probe."""


class ProviderThrottledError(ProviderError, RetryableError):
    """The provider asked us to slow down. Wait `retry_after_seconds`."""


class ProviderRefusedError(ProviderError, RetryableError):
    """The provider refused this delivery for now. It waits alone; others go on."""


class ProviderRejectedError(ProviderError, PermanentError):
    """The provider will never take this delivery. The status is failed, with its code.

    `suppresses`: the address itself is at fault, for this reason; nothing more is sent to it.
    """

    def __init__(self, message: str, *, code: str | None = None, suppresses: Suppression | None = None) -> None:
        super().__init__(message, code=code)
        self.suppresses = suppresses


class DatabaseUnavailableError(RetryableError):
    """PostgreSQL does not answer, not in time, or refuses for now. Wait and do the same again: nothing was changed.

    `state`: its SQLSTATE, empty when it said nothing.
    """

    def __init__(self, message: str, *, state: str = "") -> None:
        super().__init__(message)
        self.state = state


class RegistryUnavailableError(RetryableError):
    """The schema registry could not be asked. Park the record; it returns by itself."""


class UndecodableError(PermanentError):
    """The bytes are no message of ours. Dead-letter them as they are."""


class UnknownSchemaError(PermanentError):
    """The registry does not know the writer's schema `schema_id`. Dead-letter; redrive once it is registered."""

    def __init__(self, message: str, *, schema_id: int) -> None:
        super().__init__(message)
        self.schema_id = schema_id


class InvalidEventError(PermanentError):
    """Decoded, but `field` is absurd. Dead-letter; the producer has to mend it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class UnroutableError(PermanentError):
    """Names no user, so nobody can be told. Dead-letter."""


class UnknownRuleError(PermanentError):
    """Asks for a rule that does not exist. Dead-letter; add the rule and redrive."""


class VersionConflictError(PermanentError):
    """A change based on a version that is no longer the stored one. Read again, then change."""


class RefusedValueError(PermanentError):
    """PostgreSQL refuses a value of the batch. Halve the batch until the record stands alone; dead-letter it."""


class TooLargeError(PermanentError):
    """What the record became is larger than Kafka accepts. Dead-letter the input."""


class UnsealableError(PermanentError):
    """Sealed bytes that the user's key does not open, or a user without a key (erased)."""


class ExpiredError(PermanentError):
    """A delivery past its latest useful moment. Nobody is called; the status is expired."""


class AttemptsExhaustedError(PermanentError):
    """A delivery refused for now as often as its schedule allows. Dead-letter it; mend the cause, then redrive."""


class UnknownReferenceError(PermanentError):
    """A provider's report whose reference no send from here ever had. Dead-letter it; look who sends with our account."""


class TemplateError(PermanentError):
    """A template cannot be rendered with this data: names the template and the missing placeholder."""


class SettingsError(PermanentError):
    """The environment does not describe a worker that can run. `problems` holds one sentence a setting."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems
