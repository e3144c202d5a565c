"""Batch files as durable jobs of a running system: handed over, looked at, fetched, from anywhere.

`submit` turns lines into requests, `results` results into lines; what is needed of a line to write
its result travels with the request as a note (`notes`). `table` is what `pipemax jobs` shows.
"""
