"""Devices by their name in the configuration."""

from pipemax.proto.errors import ConfigError
from pipemax.stage_worker.devices.base import Device
from pipemax.stage_worker.devices.cpu import CpuDevice


def open_device(name: str) -> Device:
    """Raises ConfigError for a device this version does not have."""
    if name != CpuDevice.name:
        raise ConfigError(f"--device {name} is not implemented yet; use --device cpu")
    return CpuDevice()
