"""Batch files: OpenAI's lines in, a line out for each, once, whatever happens in between.

`command` decides which system does the work; `job` keeps it busy; `tally` reads what is to run and
writes what comes back; `inputs` and `outputs` are the files, `manifest` and `resume` what makes a
second run go on where the first one stopped.
"""
