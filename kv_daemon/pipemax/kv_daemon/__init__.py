"""The KV daemon: keeps KV blocks in host memory and moves them to and from every stage's device
pool while the stages compute. Decides nothing; survives a stage's crash.

`core.py` holds all state and no I/O (`events.py` is what it hears and says, `host_blocks.py` its
placement, `transfers.py` its queues); `shell.py` is its sockets and timers, `host_pool.py` its
memory, `engine.py` what carries out its copies.
"""
