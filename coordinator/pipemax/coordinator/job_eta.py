"""When unfinished jobs will be done, from how fast their results came of late. Pure."""

from collections import deque
from collections.abc import Sequence

from pipemax.proto.messages.ingest import JobInfo, JobProgress

WINDOW_S = 300.0
"""Results of so long count: long outputs end in bursts, and what ran last night says little."""
SAMPLE_S = 1.0
LEAST_RESULTS = 4
"""Nothing is forecast from fewer."""
MOST_JOBS = 64
"""Of more, those behind are not followed: every job is a label value in Prometheus."""


class JobEta:
    """Remembers, for each job, how many results there were when."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def progress(self, unfinished: Sequence[JobInfo], now_s: float) -> tuple[JobProgress, ...]:
        """`now_s`: of a clock that never goes back."""
        followed = unfinished[:MOST_JOBS]
        self._seen = {job.name: self._seen.get(job.name, deque()) for job in followed}
        return tuple(
            JobProgress(
                name=job.name,
                state=job.state,
                num_requests=job.num_requests,
                num_results=job.num_results,
                num_failed=job.num_failed,
                eta_s=self._eta_s(job, now_s),
            )
            for job in followed
        )

    def _eta_s(self, job: JobInfo, now_s: float) -> float | None:
        seen = self._seen[job.name]
        if job.state == "held" or (seen and job.num_results < seen[-1][1]):
            seen.clear()  # does not run, or is another job of the same name
        if job.state == "held":
            return None
        if not seen or now_s >= seen[-1][0] + SAMPLE_S:
            seen.append((now_s, job.num_results))
        while len(seen) > 2 and seen[1][0] <= now_s - WINDOW_S:
            seen.popleft()
        since_s, before = seen[0]
        results = job.num_results - before
        if results < LEAST_RESULTS or now_s <= since_s:
            return None
        return (job.num_requests - job.num_results) * (now_s - since_s) / results
