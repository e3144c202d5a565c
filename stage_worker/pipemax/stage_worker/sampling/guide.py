"""Outputs that follow a grammar: which tokens may come next."""

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipemax.proto.errors import InvariantError

_KEPT: Final = 64
"""Compiled grammars: a batch often has one for all its lines."""

log = logging.getLogger(__name__)


class Guide:
    """One output's place in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """`[vocab]`: what may come next; nothing, once the grammar turned out too complex to be
        followed."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, count=self._vocab_size, bitorder="little").astype(bool)
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]  # what follows quotes it all
            log.warning("a grammar cannot be followed any more: %.200s", reason)
            bits[:] = False
        return bits

    def append(self, token: int) -> None:
        self._matcher.consume_token(token)


class Guides:
    """Compiles grammars, over one model's vocabulary. Nothing is loaded before the first one."""

    def __init__(self, tokenizer: Path | None) -> None:
        """tokenizer: the model's tokenizer.json; None where no request has a grammar."""
        self._path = tokenizer
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def open(self, grammar: str, end_token_ids: tuple[int, ...], vocab_size: int) -> Guide:
        """At its begin."""
        from llguidance import LLMatcher, LLTokenizer

        if self._path is None:
            raise InvariantError("a request has a grammar, and this stage no tokenizer")
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(self._path), n_vocab=vocab_size, eos_token=list(end_token_ids)
            )
        found = self._compiled.pop(grammar, None) or LLMatcher(
            self._tokenizer, grammar, log_level=0
        )
        self._compiled[grammar] = found
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Guide(found.deep_copy(), vocab_size)
