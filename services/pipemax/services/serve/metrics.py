"""`/metrics` of the server itself; the system's own are at the coordinator's port."""

import re
from collections import Counter

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter

_SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)
_ENDPOINTS = (
    (re.compile(r"/v1/(chat/completions|completions|models|files|batches)"), ""),
    (re.compile(r"/v1/files/[^/]+"), "/v1/files/{file_id}"),
    (re.compile(r"/v1/files/[^/]+/content"), "/v1/files/{file_id}/content"),
    (re.compile(r"/v1/batches/[^/]+"), "/v1/batches/{batch_id}"),
    (re.compile(r"/v1/batches/[^/]+/cancel"), "/v1/batches/{batch_id}/cancel"),
    (re.compile(r"/v1/models/.+"), "/v1/models/{model}"),
    (re.compile(r"/(health|metrics|openapi\.json)"), ""),
)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServeMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = PrometheusCounter(
            "pipemax_http_requests",
            "HTTP requests answered, by endpoint and status.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "pipemax_http_requests_in_progress",
            "HTTP requests being answered, streams and uploads among them.",
            registry=self.registry,
        )
        self.seconds = Histogram(
            "pipemax_http_request_seconds",
            "From a request's first byte to its answer's last one.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.connected = Gauge(
            "pipemax_http_system_connected",
            "1 while a system is there to run requests.",
            registry=self.registry,
        )
        self.uploaded = PrometheusCounter(
            "pipemax_http_uploaded_bytes",
            "Bytes of files uploaded and kept.",
            registry=self.registry,
        )
        self._batches = Gauge(
            "pipemax_http_batches",
            "Batches that are known, by status.",
            ["status"],
            registry=self.registry,
        )

    def page(self, *, connected: bool, batches: Counter[str]) -> bytes:
        self.connected.set(connected)
        self._batches.clear()
        for status, count in batches.items():
            self._batches.labels(status).set(count)
        return generate_latest(self.registry)


def endpoint_of(path: str) -> str:
    """Without ids, and one word for all that is nothing: labels must be few."""
    for pattern, name in _ENDPOINTS:
        if pattern.fullmatch(path):
            return name or path
    return "other"
