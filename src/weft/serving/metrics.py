"""What a server counts, for Prometheus; labels have few values whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .batcher import Batcher
from .server import Server

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@final
class Metrics:
    """The counters of one server.

    Args:
        server: where tasks are in memory.
    """

    def __init__(self, server: Server) -> None:
        registry = self._registry = CollectorRegistry()
        self._state = _State(server)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.requests = counter("weft_requests", "Responses.", "endpoint", "status")
        self.errors = counter("weft_errors", "Refusals.", "code")
        self.latency = histogram("weft_request_seconds", "Time to respond.", SECONDS, "endpoint")
        self.rows = counter("weft_rows", "Rows that ran.")
        self._batch_rows = histogram("weft_batch_rows", "Rows in a batch.", COUNTS)
        self._batch_tasks = histogram("weft_batch_tasks", "Distinct tasks in a batch.", COUNTS)
        registry.register(self._state)

    def watch(self, batcher: Batcher) -> None:
        """Show this batcher's queue."""
        self._state.batcher = batcher

    def batch(self, rows: int, tasks: int) -> None:
        """Count a batch."""
        self.rows.inc(rows)
        self._batch_rows.observe(rows)
        self._batch_tasks.observe(tasks)

    def text(self) -> bytes:
        """Everything, in Prometheus' format."""
        return generate_latest(self._registry)


@final
class _State(Collector):
    """What is read when it is asked for."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.batcher: Batcher | None = None

    def collect(self) -> Iterator[Metric]:
        server = self._server
        waiting = 0 if self.batcher is None else self.batcher.waiting
        gauges = {
            "weft_queue_length": ("Requests that wait.", waiting),
            "weft_tasks": ("Tasks of the bank.", len(server.task_names)),
            "weft_resident_tasks": ("Tasks in memory.", len(server.resident)),
            "weft_resident_bytes": ("Bytes that tasks take in memory.", server.resident_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily("weft_loads", "Tasks loaded.", server.loads)
        yield CounterMetricFamily("weft_evictions", "Tasks that made room.", server.evictions)
