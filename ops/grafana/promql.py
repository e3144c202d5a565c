"""PromQL over /metrics and over the rules in `ops/prometheus/`, for the system that a dashboard's
variable `$instance` names."""


def of(name: str, labels: str = "") -> str:
    """Series of the system looked at."""
    return f'{name}{{instance="$instance"{", " + labels if labels else ""}}}'


def per_second(name: str, labels: str = "") -> str:
    return f"rate({of(name, labels)}[$__rate_interval])"


def quantile(share: float, histogram: str) -> str:
    buckets = f"sum by (le) (rate({of(histogram + '_bucket')}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})"
