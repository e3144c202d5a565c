"""`make gpu-check`: whether PipeMax is right on this machine's GPU, and how fast.

`parts.py` says what is checked, `runner.py` runs one part within its time, `check.py` all of them,
`report.py` keeps what was found. What a part does lies in `tests/gpu/` and `ops/benchmarks/`.
"""
