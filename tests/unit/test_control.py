from __future__ import annotations

from datetime import UTC, datetime, timedelta

from agents.control import Control, event_scope, notification_scope, rule_scope
from schemas.messages import ControlEntry

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def control(*scopes: str, before: datetime | None = None) -> Control:
    orders = {scope: ControlEntry(scope=scope, reason="why", before=before, issued_at=NOW) for scope in scopes}
    return Control(orders.get, seal_key=bytes(32))


def is_recalled(found: Control, *, producer: str = "payments", event_id: str = "e:1", accepted_at: datetime = NOW) -> bool:
    order = found.recalled(notification_id="n", producer=producer, event_id=event_id, rule="r", accepted_at=accepted_at)
    return order is not None


def test_a_notification_is_recalled_by_its_id_its_event_or_its_rule_and_by_nothing_else() -> None:
    assert all(is_recalled(control(scope)) for scope in (notification_scope("n"), event_scope("payments", "e:1"), rule_scope("r")))
    others = (notification_scope("m"), event_scope("payments", "e:2"), event_scope("stock", "e:1"), rule_scope("q"))
    assert not is_recalled(control(*others))


def test_a_colon_in_a_producers_name_means_no_other_producers_event() -> None:
    assert not is_recalled(control(event_scope("a", "b:c")), producer="a:b", event_id="c")


def test_a_recall_with_a_limit_spares_what_was_accepted_later() -> None:
    found = control(rule_scope("r"), before=NOW)
    assert is_recalled(found, accepted_at=NOW - timedelta(seconds=1))
    assert not is_recalled(found, accepted_at=NOW)


def test_an_address_is_blocked_however_it_is_spelled_and_its_scope_does_not_show_it() -> None:
    scope = control().scope_of("email", "Ada@Example.com ")
    assert "ada" not in scope.lower()
    assert control(scope).suppressed("email", "ada@example.com") is not None
    assert control(scope).suppressed("sms", "ada@example.com") is None
    assert control(scope).suppressed("email", "bob@example.com") is None


def test_a_scope_of_an_address_depends_on_the_deployments_key() -> None:
    assert control().scope_of("email", "a@b.c") != Control(lambda _scope: None, seal_key=b"1" * 32).scope_of("email", "a@b.c")
