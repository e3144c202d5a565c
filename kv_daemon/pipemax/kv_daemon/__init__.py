"""The KV daemon: keeps KV blocks in host memory and moves them to and from every stage's device
pool while the stages compute. Decides nothing; survives a stage's crash.

`core.py` holds all state and no I/O (`events.py` is what it hears and says, `host_blocks.py` its
placement, `transfers.py` and `stage_link.py` its queues); `shell.py` is its sockets and timers,
`host_pool.py` its memory, `pages.py` and `regions.py` when and where that is made to be there.
`engine.py` says what carries out its copies: `cpu_engine.py` between shared memories,
`order_engine.py` by orders to stages on GPUs, `cuda_engine.py` on streams of its own.
"""
