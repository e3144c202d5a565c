"""Text in and out: prompts to token ids, token ids to text, without torch or transformers."""

from pipemax.coordinator.text.detokenizer import Detokenizer, StopChecker
from pipemax.coordinator.text.limits import check_sampling
from pipemax.coordinator.text.processor import TextProcessor

__all__ = ["Detokenizer", "StopChecker", "TextProcessor", "check_sampling"]
