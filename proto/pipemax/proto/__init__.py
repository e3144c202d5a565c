"""The contracts between PipeMax's processes: messages, sockets, memory handles, configuration.

Everything that crosses a process boundary is defined here and nowhere else. The package imports
neither torch nor transformers, and none of the other pipemax packages.
"""

PROTOCOL_VERSION = 1
"""Raised by one whenever a message changes in a way an old peer cannot read."""
