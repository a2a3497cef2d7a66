from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks import Webhook

from channels.signing import SIGNATURE, TOLERANCE_SECONDS, BadSignatureError, StaleSignatureError, parse_secret, signed, verify

NOW = datetime.now(UTC)
OLD, NEW = ("whsec_" + base64.b64encode(letter * 32).decode() for letter in (b"o", b"n"))
BODY = b'{"status": "delivered"}'


def test_the_standard_library_verifies_what_is_signed_under_either_of_two_secrets() -> None:
    # now, not when the tests were collected: it looks at the clock itself
    headers = signed([parse_secret(OLD), parse_secret(NEW)], message_id="msg_1", at=datetime.now(UTC), body=BODY)
    for secret in (OLD, NEW):
        assert Webhook(secret).verify(BODY, headers) == {"status": "delivered"}


def test_what_was_signed_is_known_and_what_was_changed_is_not() -> None:
    keys = [parse_secret(OLD), parse_secret(NEW)]
    headers = signed(keys[1:], message_id="msg_1", at=NOW, body=BODY)
    assert verify(keys, headers, BODY, now=NOW) == "msg_1"
    for changed in (
        {"webhook-id": "msg_2"},
        {"webhook-timestamp": "1"},
        {SIGNATURE: "v1a,x \xff"},
        {SIGNATURE: ""},
        {"webhook-timestamp": "\u0661"},
    ):
        with pytest.raises(BadSignatureError):
            verify(keys, headers | changed, BODY, now=NOW)
    with pytest.raises(BadSignatureError):
        verify(keys, headers, BODY + b" ", now=NOW)
    with pytest.raises(BadSignatureError):
        verify(keys[:1], headers, BODY, now=NOW)
    with pytest.raises(BadSignatureError):
        verify([], headers, BODY, now=NOW)


@pytest.mark.parametrize("seconds", [-TOLERANCE_SECONDS - 2, TOLERANCE_SECONDS + 2])
def test_what_was_signed_at_another_time_is_stale(seconds: int) -> None:
    headers = signed([parse_secret(OLD)], message_id="msg_1", at=NOW + timedelta(seconds=seconds), body=BODY)
    with pytest.raises(StaleSignatureError):
        verify([parse_secret(OLD)], headers, BODY, now=NOW)


@pytest.mark.parametrize("text", ["", "whsec_", "whsec_!!!", OLD.removeprefix("whsec_"), "whsec_" + base64.b64encode(b"short").decode()])
def test_a_secret_that_is_none_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="is not whsec_") as caught:
        parse_secret(text)
    assert not text or text == "whsec_" or text not in str(caught.value)
