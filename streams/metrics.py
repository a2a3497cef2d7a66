"""Every metric of a worker, in a registry of its own. Bumped per batch; label values come from closed sets."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_BATCH_RECORDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The metrics of one app; `docs/metrics.md` lists them and a test compares."""

    def __init__(self, role: str) -> None:
        registry = self.registry = CollectorRegistry()
        self._role = role

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"notify_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"notify_{name}", text, labels, registry=registry)

        self.records = counter("records_total", "Records handled, by input topic.", "topic")
        self.events = counter(
            "events_total",
            "What records became at steps that decide no requests.",
            "outcome",
        )
        self.decisions = counter("decisions_total", "Requests decided; rekeyed: sent on to the user's own partition.", "outcome")
        self.deliveries = counter("deliveries_total", "Delivery attempts that ended, by how.", "channel", "lane", "provider", "outcome")
        self.attempts_open = gauge("attempts_open", "Calls to a provider that are running.", "provider")
        self.delivery_seconds = Histogram(
            "notify_delivery_seconds",
            "From the event's Kafka timestamp to the provider's acceptance.",
            ("lane", "channel"),
            registry=registry,
            buckets=_LATENCY_SECONDS,
        )
        self.batch_records = Histogram("notify_batch_records", "Records in one transaction.", registry=registry, buckets=_BATCH_RECORDS)
        self.commit_seconds = Histogram(
            "notify_commit_seconds", "How long a transaction's commit took.", registry=registry, buckets=_LATENCY_SECONDS
        )
        self.lag = gauge("lag_records", "The broker's end offset of committed records less the position.", "topic", "partition")
        self.rests = gauge("rests", "Times as long as they worked that less urgent inputs rest, while urgent ones come.", "step")
        self.table_rows = gauge("table_rows", "Rows of the owned partitions of a table.", "table")
        self.commit_age = gauge("commit_age_seconds", "Since the newest committed transaction of any owned partition.")
        self.recovery_rows = counter("recovery_rows_total", "Rows replayed from changelogs.")
        self.recovering = gauge("recovering", "1 while tables are being recovered.")
        self.dead_letters = counter("dead_letters_total", "Records set aside, by topic and error.", "topic", "error")
        self.parked = counter("parked_total", "Records set aside until the schema registry answers.")
        self.replayed = counter("replayed_records_total", "Records skipped because the watermark covers them.", "topic")
        self.suppressed = counter("suppressed_total", "Sends left out because the ledger knows the delivery.", "channel")
        self.halted = gauge("inputs_halted", "1 while an input is halted by a run of dead letters.", "topic")
        self.expired_positions = counter("expired_positions_total", "Records that fell out of retention before they were read.", "topic")
        self.open_transactions = gauge("open_transactions", "Changelog partitions whose transaction the broker has not ended in time.")
        self.store_rows = counter("store_rows_total", "Rows written into PostgreSQL, changed ones included.", "table")
        self.store_seconds = Histogram(
            "notify_store_seconds", "How long a transaction of PostgreSQL took.", registry=registry, buckets=_LATENCY_SECONDS
        )
        self.store_paused = gauge("store_paused_partitions", "Partitions of the projection that wait for PostgreSQL.")
        self.waiting = gauge("waiting_deliveries", "Deliveries that wait to be tried again.", "channel")
        self.clock_difference = gauge("clock_difference_seconds", "How far this machine's clock is ahead of the registry's.")
        of_provider = ("channel", "provider", "service")  # service: which of those behind it that fail apart, or empty
        self.provider_out = gauge("provider_out", "1 while nobody but a probe is sent to a provider.", *of_provider)
        self.provider_share = gauge("provider_share", "The part of a channel's deliveries that a provider is given.", *of_provider)
        self.unknown = gauge("unknown_deliveries", "Deliveries that may have arrived, and nothing has settled it yet.", "channel")
        self.settled = counter("settled_total", "Deliveries of unknown end that a provider's report settled.", "channel", "status")
        self.bounces = counter("bounces_total", "Mails that came back, by what they were.", "outcome")
        self.suppressions = counter("suppressions_total", "Addresses to which nothing more is sent, by why.", "channel", "reason")
        self.callbacks = counter(
            "callbacks_total", "Calls by which providers report on deliveries, by what became of them.", "source", "outcome"
        )
        self.paused = gauge("paused_partitions", "Partitions that wait because their provider does not answer.", "channel")
