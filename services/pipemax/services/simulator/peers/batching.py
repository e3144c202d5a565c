"""Continuous batching as in vLLM 0.7, first come first served, for one engine.

Every step decodes all running requests and fills the rest of its token budget with prompt chunks.
A new request joins when there is room for its whole prompt beside a small watermark. When a decode
finds no block free, the latest request is preempted and later computed again from its prompt.
"""

from collections import deque
from collections.abc import Callable, Iterable

from pipemax.services.simulator.peers.jobs import Job, Part, Pool

WATERMARK = 0.01
"""Share of the blocks that admission leaves free."""


class ContinuousBatching:
    """One engine's waiting and running requests. One step at a time."""

    def __init__(
        self,
        jobs: Iterable[Job],
        pool: Pool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        preempt: Callable[[Job], None],
    ) -> None:
        """`preempt` takes a running request's blocks away; it then waits as the first."""
        self.waiting = deque(jobs)
        self.running: list[Job] = []
        """In order of arrival."""
        self.pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._take_away = preempt

    def plan(self) -> list[Part]:
        """The next step; empty when there is nothing to do. Takes the blocks it needs."""
        parts = self._decodes()
        budget = self._max_tokens - len(parts)
        for job in self.running:
            if budget and job.missing > 1:
                tokens = min(budget, job.missing)
                parts.append((job, tokens))
                budget -= tokens
        while budget > 0 and self._can_admit():
            job = self.waiting.popleft()
            self.pool.take(job, job.prompt_tokens + job.generated)
            self.running.append(job)
            tokens = min(budget, job.missing)
            parts.append((job, tokens))
            budget -= tokens
        return parts

    def ended(self) -> None:
        """The planned step is over: finished requests leave."""
        self.running = [job for job in self.running if not job.finished]

    def _decodes(self) -> list[Part]:
        parts: list[Part] = []
        index = 0
        while index < len(self.running) and len(parts) < self._max_tokens:
            job = self.running[index]
            index += 1
            if job.missing != 1:
                continue
            wanted = self.pool.wants(job, job.computed + 1)
            while wanted > self.pool.free and self.running[-1] is not job:
                self._preempt(self.running.pop())
            if wanted > self.pool.free:  # it is the latest itself
                self._preempt(self.running.pop())
                break
            self.pool.take(job, job.computed + 1)
            parts.append((job, 1))
        return parts

    def _preempt(self, job: Job) -> None:
        self._take_away(job)
        self.waiting.appendleft(job)

    def _can_admit(self) -> bool:
        if not self.waiting or len(self.running) >= self._max_num_seqs:
            return False
        job = self.waiting[0]
        wanted = self.pool.wants(job, job.prompt_tokens + job.generated)
        spare = int(WATERMARK * self.pool.num_blocks) if self.running else 0
        return wanted <= self.pool.free - spare
