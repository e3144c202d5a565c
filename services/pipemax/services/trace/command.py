"""What `pipemax trace` does."""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipemax.proto.errors import ConfigError, PipemaxError
from pipemax.proto.messages.spans import StageSpans, unpack_i64
from pipemax.proto.sizes import format_size
from pipemax.proto.states import STATES
from pipemax.services.trace.chrome import ChromeTrace
from pipemax.services.trace.collect import collect
from pipemax.services.trace.ledger import StageLedger
from pipemax.services.where import Where


@dataclass(frozen=True, slots=True)
class Recording:
    """What a trace holds."""

    stages: dict[int, StageLedger]
    num_copies: int
    copied_bytes: int


def record(where: Where, seconds: float, path: Path) -> Recording:
    """Writes `path`. Raises ConfigError when it cannot be written, else as `collect`; then there is
    no file."""
    with where.client("trace") as client:
        status = client.status()
    stages: defaultdict[int, StageLedger] = defaultdict(StageLedger)
    num_copies = copied_bytes = 0
    about = {
        "system": str(where),
        "model": status.model_name,
        "layers": [list(stage.layers) for stage in status.stages],
        "recorded_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("w") as out:
            trace = ChromeTrace(out, len(status.stages), about)
            for report in collect(where, len(status.stages), seconds):
                trace.add(report)
                if isinstance(report, StageSpans):
                    stages[report.stage].add(report)
                else:
                    num_copies += len(report.directions)
                    copied_bytes += sum(unpack_i64(report.sizes_bytes))
            trace.close()
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error}") from error
    except (PipemaxError, KeyboardInterrupt):
        partial.unlink(missing_ok=True)
        raise
    return Recording(dict(sorted(stages.items())), num_copies, copied_bytes)


def summary(found: Recording) -> Table:
    """Each stage's shares, and what is missing of it."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("stage")
    for heading in ("seconds", "spans", *STATES, "missing"):
        table.add_column(heading, justify="right", overflow="fold")
    for stage, ledger in found.stages.items():
        missing = "–" if ledger.is_complete else f"{ledger.missing_ns / 1e9:.3f} s"
        table.add_row(
            f"stage-{stage}",
            f"{sum(ledger.spans_ns) / 1e9:.2f}",
            str(ledger.num_spans),
            *(f"{ledger.share(index):.1%}" for index in range(len(STATES))),
            missing,
        )
    return table


def copies_line(found: Recording) -> str:
    return f"{found.num_copies} KV copies, {format_size(found.copied_bytes)}"
