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

    def __init__(self, matcher: Any, end_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self._matcher = matcher
        self._end_token_ids = list(end_token_ids)
        self._vocab_size = vocab_size
        self._failed = False

    def allowed(self) -> npt.NDArray[np.bool_]:
        """`[vocab]`: what may come next. Where the grammar turns out too complex to go on with, the
        output ends."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, count=self._vocab_size, bitorder="little").astype(bool)
        if self._matcher.is_error() and not self._failed:
            self._failed = True
            log.warning("an output ends early: %s", self._matcher.get_error())
        if self._failed or not bits.any():
            bits[:] = False
            bits[self._end_token_ids] = True
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
        found = self._compiled.pop(grammar, None) or LLMatcher(self._tokenizer, grammar)
        self._compiled[grammar] = found
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Guide(found.deep_copy(), end_token_ids, vocab_size)
