"""The whole system on a GPU, real processes and all: greedy float32 tokens equal those of
`transformers.generate` on the same GPU, while the device pool is so small that much of the decoded
context has to come back from the host. Every way in which stages work together is taken, each by
more than one family."""

import functools
from collections.abc import Callable

import pytest
import torch

from support.gpu_systems import Way, Work, gpu_config, gpu_system, make_work
from support.local_system import greedy, tokens_of
from support.model_zoo import build_model

WAYS = (
    ("llama", Way(1)),
    ("llama", Way(2, "ipc", "stage")),
    ("llama", Way(3, "shm", "daemon")),
    ("llama", Way(2, "shm", "stage", graphs=False)),
    ("gemma2", Way(2, "shm", "daemon")),
    ("gemma2", Way(3, "ipc", "stage")),
    ("qwen3", Way(1, copies="daemon")),
    ("qwen3", Way(2, "ipc", "daemon", graphs=False)),
    ("mixtral", Way(2, "ipc", "stage")),
)
_REQUESTS, _LONGEST, _OUTPUT = 24, 240, 90
_REHEARSED = (WAYS[1], WAYS[4])
_REHEARSED_REQUESTS = 14


@pytest.fixture(scope="session")
def work_of(
    tmp_path_factory: pytest.TempPathFactory, device: torch.device, rehearsal: bool
) -> Callable[[str], Work]:
    requests = _REHEARSED_REQUESTS if rehearsal else _REQUESTS

    def make(family: str) -> Work:
        model_dir = build_model(family, tmp_path_factory.mktemp(family))
        return make_work(model_dir, device, family, requests, _LONGEST, _OUTPUT)

    return functools.cache(make)


@pytest.mark.parametrize(("family", "way"), WAYS, ids=str)
def test_tokens_equal_transformers(
    work_of: Callable[[str], Work],
    family: str,
    way: Way,
    rehearsal: bool,
    figure: Callable[..., None],
) -> None:
    if rehearsal and (family, way) not in _REHEARSED:
        pytest.skip("a rehearsal takes two of them")
    work = work_of(family)
    config = gpu_config(
        work.model_dir,
        way,
        rehearsal=rehearsal,
        device_blocks=30,
        host_blocks=1024,
        max_num_batched_tokens=256,
        max_num_seqs=32,  # a graph for each bucket of batch sizes up to it
    )
    with gpu_system(config, rehearsal=rehearsal) as system, system.client() as client:
        completions = client.generate(work.prompts, [greedy(count) for count in work.outputs])
        status = client.status()
    tokens = tokens_of(completions)
    equal = sum(ours == theirs for ours, theirs in zip(tokens, work.expected, strict=True))
    transports = {stage.activation_transport for stage in status.stages[:-1]}
    figure(
        f"{family}, {way}: equal outputs", equal, f"of {len(tokens)}", at_least=len(tokens),
        note=f"{status.decode_prefetched_tokens / max(1, status.decode_context_tokens):.0%} of "
        f"the decoded context prefetched{''.join(f', {name}' for name in transports)}",
    )  # fmt: skip
    assert tokens == work.expected
    least = 0.0 if rehearsal else 0.3 * status.decode_context_tokens
    assert status.decode_prefetched_tokens > least
    assert status.load_bytes > 0
    if way.stages > 1:
        assert transports == {way.transport}
