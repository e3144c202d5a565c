"""Prompts that begin alike share their full blocks: which blocks those are, and who uses them.

A tree over token ids, one `SharedBlock` per full block of a prompt: its children are told apart by
the very tokens of the next block, so a block is found by its whole history and never by a hash that
another history may have too. A request is entered where its chain of blocks ends; a block is used
by all that end at or below it. Blocks of the tree live as long as somebody uses them.

A block enters the tree when the first request that needs it is admitted, before it is computed:
the others wait for whoever fills it instead of computing the same. From the moment the step that
fills it is planned it is `ready`: stages run steps in order, so whoever reads it in a later step
finds it.

The tree knows nobody's tables and moves nothing: `SchedulerState` does.
"""

from array import array
from collections.abc import Iterator

from pipemax.coordinator.request import NO_STEP, HostState, Request


class SharedBlock:
    """One full block of a prompt on all stages. On the daemon its name is (`kv_key`, `index`): of
    the request that was the first to use it, who may have ended."""

    __slots__ = (
        "children",
        "device",
        "device_refs",
        "ends",
        "filled_step",
        "filler",
        "host",
        "index",
        "kv_key",
        "last_step",
        "load_step",
        "num_users",
        "parent",
        "ready",
        "tokens",
    )

    def __init__(
        self, parent: "SharedBlock | None", tokens: bytes, index: int, kv_key: int, device: int
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        """Ids, as in a request's array."""
        self.index = index
        """Its place in every table that it is in."""
        self.kv_key = kv_key
        self.device = device
        """NO_BLOCK where only the host holds it."""
        self.device_refs = 0
        """Tables that name `device`."""
        self.host = HostState.NONE
        self.ready = False
        """A planned step fills it, or has filled it."""
        self.filled_step = NO_STEP
        self.filler: Request | None = None
        """Who has begun to compute it."""
        self.load_step = NO_STEP
        """Step it was last prefetched for."""
        self.last_step = NO_STEP
        """Last step, as far as those who gave their reference back know, that reads it."""
        self.num_users = 0
        self.ends: dict[int, Request] | None = None
        """Users whose chain ends here, by key."""
        self.children: dict[bytes, SharedBlock] | None = None


class PrefixTree:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._first: dict[bytes, SharedBlock] = {}
        self._by_name: dict[tuple[int, int], SharedBlock] = {}
        self.num_references = 0
        """Blocks of the tree, each counted as often as it is used."""
        self.version = 0
        """Grows with every block that comes or goes."""

    @property
    def num_blocks(self) -> int:
        return len(self._by_name)

    @property
    def num_saved(self) -> int:
        """Blocks that running requests would hold in addition if they shared nothing."""
        return self.num_references - self.num_blocks

    def __iter__(self) -> Iterator[SharedBlock]:
        """Parents come before their children."""
        return iter(self._by_name.values())

    def find(self, kv_key: int, index: int) -> SharedBlock | None:
        """By its name on the daemon."""
        return self._by_name.get((kv_key, index))

    def match(self, request: Request) -> list[SharedBlock]:
        """The blocks that the request's prompt begins with, first to last. One token of the prompt
        is left out: it has to be computed to know the next."""
        size, tokens = self._block_size, request.tokens
        found: list[SharedBlock] = []
        children: dict[bytes, SharedBlock] | None = self._first
        for index in range(shareable_blocks(request, size)):
            if not children:
                break
            block = children.get(tokens[index * size : (index + 1) * size].tobytes())
            if block is None:
                break
            found.append(block)
            children = block.children
        return found

    def grow(self, chain: list[SharedBlock], request: Request, devices: "array[int]") -> None:
        """Append to `chain`, all of whose blocks are in the tree, blocks of the request's own: one
        for each of `devices`."""
        size, tokens = self._block_size, request.tokens
        parent = chain[-1] if chain else None
        for index, device in enumerate(devices, len(chain)):
            key = tokens[index * size : (index + 1) * size].tobytes()
            block = SharedBlock(parent, key, index, request.kv_key, device)
            if parent is None:
                self._first[key] = block
            else:
                if parent.children is None:
                    parent.children = {}
                parent.children[key] = block
            self._by_name[request.kv_key, index] = block
            chain.append(block)
            parent = block
        self.version += 1

    def enter(self, request: Request) -> None:
        """The request uses its `shared` blocks from now on."""
        chain = request.shared
        for block in chain:
            block.num_users += 1
        self.num_references += len(chain)
        if chain:
            last = chain[-1]
            if last.ends is None:
                last.ends = {}
            last.ends[request.key] = request

    def leave(self, request: Request) -> list[SharedBlock]:
        """The request uses none of them any more. Returns those that nobody uses, deepest first:
        they are not in the tree any more."""
        chain = request.shared
        request.shared = []
        self.num_references -= len(chain)
        if chain:
            ends = chain[-1].ends
            assert ends is not None
            del ends[request.key]
        unused: list[SharedBlock] = []
        for block in reversed(chain):
            block.num_users -= 1
            if not block.num_users:
                unused.append(block)
                self._remove(block)
        return unused

    def replant(self, kept: "dict[Request, list[SharedBlock]]") -> None:
        """Start over with these requests and these chains, of blocks that were in the tree; each
        chain ends where it ends now, or earlier."""
        self._first.clear()
        self._by_name.clear()
        self.num_references = 0
        self.version += 1
        for chain in kept.values():
            for block in chain:
                block.num_users, block.ends, block.children = 0, None, None
        for request, chain in kept.items():
            for block in chain:
                siblings = self._first
                if block.parent is not None:
                    siblings = block.parent.children = block.parent.children or {}
                siblings[block.tokens] = block
                self._by_name[block.kv_key, block.index] = block
            request.shared = chain
            self.enter(request)

    def users(self, block: SharedBlock) -> Iterator[Request]:
        """Requests whose chains go through `block`."""
        below = [block]
        while below:
            one = below.pop()
            if one.ends:
                yield from one.ends.values()
            if one.children:
                below.extend(one.children.values())

    def _remove(self, block: SharedBlock) -> None:
        siblings = self._first if block.parent is None else block.parent.children
        assert siblings is not None
        del siblings[block.tokens]
        del self._by_name[block.kv_key, block.index]
        self.version += 1


def shareable_blocks(request: Request, block_size: int) -> int:
    """Full blocks of the prompt but for its last token, whose logits are needed. None where every
    token's logits are wanted: all of the prompt is computed then."""
    if request.sampling.prompt_logprobs is not None:
        return 0
    return (request.num_prompt - 1) // block_size
