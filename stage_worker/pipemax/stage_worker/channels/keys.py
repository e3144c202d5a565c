"""Keys of the activation channel over TCP. The launcher makes them; free of torch."""

import os
from pathlib import Path

import msgspec
import zmq

from pipemax.proto.errors import ConfigError

KEYS_FILE = "activation-keys.json"


class ActivationKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CURVE key pairs, Z85 text: one for whoever receives, one for whoever sends. They are one
    run's, so a process of another run can neither listen in nor push rows."""

    receiver_public: str
    receiver_secret: str
    sender_public: str
    sender_secret: str


def create_activation_keys(run_dir: Path) -> None:
    """New keys for this run, readable by the owner only. Replaces an earlier run's."""
    receiver_public, receiver_secret = zmq.curve_keypair()
    sender_public, sender_secret = zmq.curve_keypair()
    keys = ActivationKeys(
        receiver_public=receiver_public.decode(),
        receiver_secret=receiver_secret.decode(),
        sender_public=sender_public.decode(),
        sender_secret=sender_secret.decode(),
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


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path`, mode 0600, so that a reader sees the old content or the new, never a part."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
    draft.replace(path)
