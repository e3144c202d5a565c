"""Keys of the activation channel over TCP. The launcher makes them; free of torch."""

from pathlib import Path

import msgspec

from pipemax.proto.curve import KeyPair, make_key_pair
from pipemax.proto.errors import ConfigError
from pipemax.proto.key_files import replace_file

KEYS_FILE = "activation-keys.json"


class ActivationKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CURVE key pairs, Z85 text: one for whoever receives, one for whoever sends. They are one
    run's, so a process of another run can neither listen in nor push rows."""

    receiver_public: str
    receiver_secret: str
    sender_public: str
    sender_secret: str

    @property
    def receiver(self) -> KeyPair:
        return KeyPair(self.receiver_public, self.receiver_secret)

    @property
    def sender(self) -> KeyPair:
        return KeyPair(self.sender_public, self.sender_secret)


def create_activation_keys(run_dir: Path) -> None:
    """New keys for this run, readable by the owner only. Replaces an earlier run's."""
    receiver, sender = make_key_pair(), make_key_pair()
    keys = ActivationKeys(
        receiver_public=receiver.public,
        receiver_secret=receiver.secret,
        sender_public=sender.public,
        sender_secret=sender.secret,
    )
    replace_file(run_dir / KEYS_FILE, msgspec.json.encode(keys))


def load_activation_keys(run_dir: Path) -> ActivationKeys:
    """Raises ConfigError when there are none: activations never travel over TCP in the clear."""
    path = run_dir / KEYS_FILE
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} is readable by others; start the system again")
        return msgspec.json.decode(path.read_bytes(), type=ActivationKeys)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"activations over TCP need CURVE keys, and {path} has none ({error}); "
            "start the system with `pipemax up`, or use --activation-transport shm"
        ) from error


def endpoint_file(run_dir: Path, stage: int) -> Path:
    """Where the receiving stage `stage` says at which TCP endpoint it listens."""
    return run_dir / f"act-{stage}.endpoint"
