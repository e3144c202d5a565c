"""Costs measured on a live system, in place of data sheets: `pipemax simulate --measured FILE`.

The file is one JSON object. Times in seconds, rates in bytes per second, no prefixes:

    {
      "format": "pipemax-measured-1",
      "description": "2 stages on 2 cores of ..., commit ..., date",
      "model": "m100",
      "block_size": 16,
      "num_device_blocks": 120,          of the stage with the fewest; ids mean the same on all
      "num_host_blocks": 2000,           0: offloading off
      "stages": [                        one object per stage, first stage first
        {
          "num_layers": 6,
          "block_bytes": 98304,          of one KV block on this stage
          "fixed_s": 4.1e-3,             δ
          "per_request_s": 3e-5,         α, for each decoding request
          "per_context_token_s": 2e-8,   β, for each context token decoding requests read
          "per_prompt_token_s": 5e-5,    π
          "per_prompt_pair_s": 1e-9,     γ, for each pair of a prompt token and a token it sees
          "rows_factors": [[1, 1.0], [128, 1.1], [129, 1.3]],     c, optional
          "overhead_s": 1e-4,            optional: a step's `prepare` and `send`, not in `compute`
          "load_bytes_s": 2.0e9,         optional here and next: needed if num_host_blocks > 0;
          "store_bytes_s": 2.0e9         measured while this stage computes and other links copy
        }
      ],
      "link_groups": [[0], [1]],         optional: stages that share one link; default each its own
      "duplex": true,                    optional: false if loads and stores of a link take turns
      "compute_slowdown": [1.0, 1.6],    optional, see below
      "message_s": 5e-5,                 optional from here on: one message over a local socket
      "plan_s": 3e-4,                    from tokens at the coordinator to the next plan leaving it
      "hop_s": 1.5e-5,                   activations to the next stage: latency,
      "hop_row_s": 1e-6,                 and for each row (token)
      "copy_s": 1e-5                     from the end of a copy to the daemon knowing it
    }

A stage computes a step of b decoding requests over L context tokens, P prompt tokens and A pairs in

    T = c(b + P)·(fixed_s + per_request_s·b + per_prompt_token_s·P)
        + per_context_token_s·L + per_prompt_pair_s·A

as the coordinator's own cost model has it. An item of one token counts as decoding, also if it is a
prompt's last. c is linear between the rows given and constant beyond them; a jump is two
neighbouring rows.

*Shared links.* Copies of the stages of a group take turns in each direction, and with `duplex`
false in both together, each at its own stage's rate. A daemon that copies for all stages with one
thread is one group with `duplex` false; an emulated rate limit per stage and direction is the
default.

*Shared cores.* `compute_slowdown` has one factor for each number of stages that compute at the same
moment: with [1.0, 1.6], a step runs 1.6 times slower for as long as two stages compute, and the
costs are those of a stage that computes alone. If the costs were measured with all stages at work,
as in steady decode, leave it out.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pipemax.proto.errors import ConfigError
from pipemax.stage_worker.modelled.roofline import StepLoad

Cost = Annotated[float, msgspec.Meta(ge=0)]
Rate = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class MeasuredStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage's costs and its link's rates, see the module."""

    num_layers: Count
    block_bytes: Count
    fixed_s: Cost
    per_request_s: Cost
    per_context_token_s: Cost
    per_prompt_token_s: Cost
    per_prompt_pair_s: Cost
    rows_factors: tuple[tuple[Count, Rate], ...] = ()
    overhead_s: Cost = 0.0
    load_bytes_s: Rate | None = None
    store_bytes_s: Rate | None = None

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.rows_factors]
        if any(later <= row for row, later in pairwise(rows)):
            raise ValueError(f"rows_factors: the rows {rows} must climb")
        if self.fixed_s + self.per_request_s <= 0:
            raise ValueError("a step would take no time: fixed_s and per_request_s are both 0")

    @property
    def weights_bytes(self) -> float:
        """Not measured: a restarted stage takes no time to read them."""
        return 0.0

    def step_s(self, load: StepLoad) -> float:
        """Compute time of one step, `overhead_s` not included."""
        rows = load.decode_rows + load.prefill_rows
        product = (
            self.fixed_s
            + self.per_request_s * load.decode_rows
            + self.per_prompt_token_s * load.prefill_rows
        )
        attention = (
            self.per_context_token_s * load.decode_context
            + self.per_prompt_pair_s * load.prefill_pairs
        )
        return self.factor(rows) * product + attention

    def factor(self, rows: int) -> float:
        """c(rows)."""
        points = self.rows_factors
        if not points:
            return 1.0
        if rows <= points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in pairwise(points):
            if rows <= right:
                return low + (high - low) * (rows - left) / (right - left)
        return points[-1][1]


class MeasuredSystem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A live system's figures, see the module."""

    format: Literal["pipemax-measured-1"]
    description: str
    model: str
    block_size: Count
    num_device_blocks: Count
    num_host_blocks: Annotated[int, msgspec.Meta(ge=0)]
    stages: Annotated[tuple[MeasuredStage, ...], msgspec.Meta(min_length=1, max_length=1024)]
    link_groups: tuple[tuple[int, ...], ...] = ()
    duplex: bool = True
    compute_slowdown: tuple[Rate, ...] = ()
    message_s: Cost = 50e-6
    plan_s: Cost = 300e-6
    hop_s: Cost = 15e-6
    hop_row_s: Cost = 0.0
    copy_s: Cost = 10e-6

    def __post_init__(self) -> None:
        indices = list(range(len(self.stages)))
        if self.link_groups and sorted(i for g in self.link_groups for i in g) != indices:
            raise ValueError(f"link_groups must hold each of the stages {indices} once")
        if self.compute_slowdown:
            self._check_slowdown(self.compute_slowdown)
        for index, stage in enumerate(self.stages):
            if self.num_host_blocks and not (stage.load_bytes_s and stage.store_bytes_s):
                raise ValueError(
                    f"stage {index} needs load_bytes_s and store_bytes_s: num_host_blocks is "
                    f"{self.num_host_blocks}"
                )

    def _check_slowdown(self, factors: Sequence[float]) -> None:
        if len(factors) != len(self.stages) or min(factors) < 1 or list(factors) != sorted(factors):
            raise ValueError(
                f"compute_slowdown needs {len(self.stages)} factors, one for each number of stages "
                "that compute at once, none below 1 and none below the one before it"
            )

    @property
    def group_of(self) -> tuple[int, ...]:
        """By stage: which link it uses."""
        groups = self.link_groups or tuple((index,) for index in range(len(self.stages)))
        found = {stage: group for group, members in enumerate(groups) for stage in members}
        return tuple(found[stage] for stage in range(len(self.stages)))


def load_measured(path: Path) -> MeasuredSystem:
    """Reads a file of the form described above. Raises ConfigError that names the file and what is
    wrong in it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=MeasuredSystem)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} holds no measured system: {error}") from error
