"""The plain device backend against float64; Triton and FlashInfer are then read against both."""

import pytest
import torch

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device.reference import ReferenceBackend
from support import attention_cases
from support.attention_cases import CASES, Case, Prepared


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_follows_the_definition(case: Case) -> None:
    attention_cases.check(ReferenceBackend(), case, torch.device("cpu"))


def test_pools_of_more_than_2_31_numbers() -> None:
    attention_cases.check_far_blocks(ReferenceBackend(), torch.device("cpu"))


def test_attention_without_a_pool_is_refused() -> None:
    prepared = attention_cases.prepare(Case(), torch.device("cpu"))
    with pytest.raises(InvariantError, match="before a pool was bound"):
        ReferenceBackend().attend(
            prepared.step,
            Prepared.LAYER,
            prepared.query,
            prepared.key,
            prepared.value,
            scaling=1.0,
            window=0,
            softcap=0.0,
        )
