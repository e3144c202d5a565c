"""The states of a stage: every moment belongs to exactly one. All but `compute` are bubbles."""

from typing import Final, Literal, get_args

State = Literal["compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send"]
STATES: Final[tuple[State, ...]] = get_args(State)
