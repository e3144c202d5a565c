"""Selection policies by name."""

from pipemax.coordinator.policy import OldestFirst, SelectionPolicy
from pipemax.proto.errors import ConfigError

_POLICIES = {"oldest-first": OldestFirst}


def policy_by_name(name: str) -> SelectionPolicy:
    """Raises ConfigError for an unknown name."""
    found = _POLICIES.get(name)
    if found is None:
        raise ConfigError(f"policy {name!r} is not known; known are {', '.join(_POLICIES)}")
    return found()
