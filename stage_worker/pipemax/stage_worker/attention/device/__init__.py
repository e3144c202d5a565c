"""Attention of a step whose inputs lie on a device: one packed buffer, one copy, no host waits."""
