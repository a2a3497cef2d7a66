"""What a command cannot do, in one or two plain sentences with what to do about it: never a traceback for a user."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException

from schemas.errors import DatabaseUnavailableError, NotifyError, RegistryUnavailableError, SettingsError

EXIT_FAILURE = 1
EXIT_SETTINGS = 2

# librdkafka's own codes begin with an underscore, which makes them no less public
_UNREACHABLE = frozenset({KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._RESOLVE})  # noqa: SLF001
_MISSING = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})  # noqa: SLF001
_DENIED = frozenset(
    {
        KafkaError._AUTHENTICATION,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
    }
)


class CliError(Exception):
    """The command cannot do what was asked. The message says why and what to do; show it and stop."""

    def __init__(self, *sentences: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(" ".join(sentences))
        self.sentences = list(sentences)
        self.exit_code = exit_code


def explain(error: Exception) -> tuple[list[str], int] | None:
    """Return the sentences that tell a user about `error`, and the exit code; None for an error nobody foresaw."""
    match error:
        case CliError():
            return error.sentences, error.exit_code
        case SettingsError():
            return list(error.problems), EXIT_SETTINGS
        case RegistryUnavailableError():
            return [f"{_sentence(error)} Is it running, and is NOTIFY_REGISTRY_URL right? `notify doctor` checks."], EXIT_FAILURE
        case DatabaseUnavailableError():
            return [f"PostgreSQL does not do it now: {error}. Is it running, and is NOTIFY_POSTGRES_URL right?"], EXIT_FAILURE
        case NotifyError():
            return [_sentence(error)], EXIT_FAILURE
        case KafkaException():
            return [explain_kafka(error)], EXIT_FAILURE
    return None


def explain_kafka(error: KafkaException) -> str:
    """Return a sentence or two about an error of the Kafka client, with what to do."""
    cause = error.args[0] if error.args else None
    if not isinstance(cause, KafkaError):
        return f"Kafka's client failed: {error}."
    code = cause.code()
    if code in _UNREACHABLE:
        return "Kafka does not answer. Is it running, and is NOTIFY_KAFKA_BOOTSTRAP right? `notify doctor` checks."
    if code in _MISSING:
        return "A topic or partition does not exist. Run `notify topics ensure`."
    if code in _DENIED:
        return f"Kafka does not allow this ({cause.name()}). `notify doctor` says which rights are missing, or what is wrong with our name."
    return f"Kafka refused: {cause.str().rstrip('.')} ({cause.name()})."


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."
