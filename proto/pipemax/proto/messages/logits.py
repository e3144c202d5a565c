"""The last stage and the sampler workers (sockets `logits-<i>`). Logits travel through a ring in
shared memory, about which everything is agreed once."""

from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.control import SampleRow
from pipemax.proto.messages.types import I32, Count, Epoch, Message, RequestKey, StepId


class LogitsOffer(Message, frozen=True, kw_only=True, tag="logits_offer"):
    """From the last stage, on every Reset: float32 `[num_slots, max_rows, vocab_size]`."""

    epoch: Epoch
    handle: MemfdHandle
    num_slots: Count
    max_rows: Count
    vocab_size: Count


class LogitsAccepted(Message, frozen=True, kw_only=True, tag="logits_accepted"):
    """The sampler maps the ring and waits for logits."""

    epoch: Epoch


class LogitsReady(Message, frozen=True, kw_only=True, tag="logits_ready"):
    """A sampler's share of a step, in the order of steps. Its logits lie in the ring's entry `slot`
    from row `first_row` on, and stay as they are until the slot's next step is planned, which is
    after the sampler's answer (RowsSampled, to the coordinator). A share without rows, which only
    says who has ended, has no answer."""

    epoch: Epoch
    step: StepId
    slot: Count
    first_row: Count
    rows: I32
    """Indices in the plan's `sample`."""
    sample: tuple[SampleRow, ...]
    """Of `rows`."""
    ended: tuple[RequestKey, ...] = ()
    """Requests whose SampleRules this sampler need not keep."""
