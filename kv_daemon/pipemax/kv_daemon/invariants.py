"""What must hold between any two events. Reads everything, changes nothing."""

from collections import Counter
from typing import TYPE_CHECKING

from pipemax.kv_daemon.events import DIRECTIONS, Direction
from pipemax.kv_daemon.host_blocks import UNPLACED, HostBlock
from pipemax.kv_daemon.stage_link import StageLink
from pipemax.kv_daemon.transfers import Job
from pipemax.proto.errors import InvariantError

if TYPE_CHECKING:
    from pipemax.kv_daemon.core import KvCore


def check(core: "KvCore") -> None:
    """Raises InvariantError for the first law that does not hold. O(everything): for tests."""
    _check_host_blocks(core)
    _check_draining(core)
    for stage in core.stages:
        for direction in DIRECTIONS:
            _check_lane(stage, direction)
        _check_store_bits(core, stage)


def _require(law: bool, text: str) -> None:
    if not law:
        raise InvariantError(text)


def _check_host_blocks(core: "KvCore") -> None:
    """free + stored + being stored + draining = total, and no host block has two owners."""
    table = core.table
    table.free.check_invariants()
    owners = Counter(block.host_id for block in table if block.host_id != UNPLACED)
    owners.update(block.host_id for block in table.draining)
    for start, end in table.free.extents():
        owners.update(range(start, end))
    _require(owners == Counter(range(table.free.total)), f"owners of host blocks: {owners}")
    storing = {block for block in table if block.to_store}
    _require(storing == set(table.storing), "the blocks being stored are not those listed")
    _require(not any(block.dropped for block in table), "the table holds a dropped block")
    unplaced = [block for block in table if block.host_id == UNPLACED]
    waiting = [move.block for _, move in core.waiting]
    _require(set(unplaced) == set(waiting), "blocks without a place are not those that wait")
    _require(len(waiting) == len(set(waiting)), "a block waits twice")
    _require(not waiting or not table.free.num_free, "a block waits while a host block is free")
    _require(len(waiting) <= len(table.draining), "more blocks wait than drain")


def _check_draining(core: "KvCore") -> None:
    """Exactly the dropped blocks under copy drain, each counted once per copy."""
    under_copy: Counter[HostBlock] = Counter()
    void = 0
    for stage in core.stages:
        for lane in stage.lanes.values():
            for copy in lane.running:
                under_copy.update(b for b, _ in copy.moves if b.dropped)
                void += copy.void
    counted = {block: block.copies for block in core.table.draining}
    _require(dict(under_copy) == counted, "draining blocks are not those under copy")
    requests = {block.request for block in counted}
    _require(all(map(core.table.is_draining, requests)), "a draining request is not known as such")
    _require(core.pending_releases.keys() <= requests, "a Release waits for no copy")
    _require(void == core.void_running, f"{core.void_running} void copies counted, {void} run")


def _jobs(stage: StageLink, direction: Direction) -> set[Job]:
    lane = stage.lanes[direction]
    jobs = {job for _, _, job in (*lane.ready, *lane.gated)}
    jobs.update(copy.job for copy in lane.running if not copy.void)
    if direction == "load":
        jobs.update(job for loads in stage.postponed.values() for job, _ in loads)
    return jobs


def _check_lane(stage: StageLink, direction: Direction) -> None:
    """Counts agree with contents, gates are open exactly as `computed` says, nothing idles."""
    lane = stage.lanes[direction]
    where = f"{direction} on stage {stage.index}"
    not_queued: Counter[Job] = Counter()
    for copy in lane.running:
        if not copy.void:
            not_queued[copy.job] += len(copy.moves)
    postponed: Counter[Job] = Counter()
    if direction == "load":
        postponed.update(job for loads in stage.postponed.values() for job, _ in loads)
    not_queued.update(postponed)
    total = 0
    for job in _jobs(stage, direction):
        left = len(job.moves) - job.cursor + len(job.late)
        _require(
            job.outstanding == left + not_queued[job], f"{where}: a job counts its moves wrongly"
        )
        _require(
            job.unstarted == left + postponed[job], f"{where}: a job counts its starts wrongly"
        )
        total += job.outstanding
        _require(
            job.suspect or _is_plain(stage, direction, job), f"{where}: a job trusts its moves"
        )
    _require(lane.outstanding == total, f"{where}: the lane counts its moves wrongly")
    _require(all(job.queued for _, _, job in lane.ready), f"{where}: a queued job thinks it is not")
    _require(all(after > stage.computed for after, _, _ in lane.gated), f"{where}: late gate")
    if not lane.running and stage.attached:
        _require(all(job.exhausted for _, _, job in lane.ready), f"{where}: idle in spite of work")


def _is_plain(stage: StageLink, direction: Direction, job: Job) -> bool:
    """All moves left may start as they are."""
    not_yet = stage.bit if direction == "load" else 0
    left = (*job.moves[job.cursor :], *job.late)
    return not any(block.dropped or block.to_store & not_yet for block, _ in left)


def _check_store_bits(core: "KvCore", stage: StageLink) -> None:
    """A part not stored yet is queued, under copy or waiting once; a stored part is not."""
    lane = stage.lanes["store"]
    jobs = _jobs(stage, "store")
    moves = [move for job in jobs for move in (*job.moves[job.cursor :], *job.late)]
    moves += [move for _, move in core.waiting]
    for copy in lane.running:
        if not copy.void:
            moves += copy.moves
    to_come = Counter(move.block for move in moves if not move.block.dropped)
    expected = Counter(block for block in core.table if block.to_store & stage.bit)
    _require(to_come == expected, f"stage {stage.index}: stores to come are not those queued")
    for block in stage.postponed:
        _require(not block.dropped, "a load of a dropped block waits")
        waits = bool(block.to_store & stage.bit)
        _require(waits, f"stage {stage.index}: a load waits for a block that is stored")
