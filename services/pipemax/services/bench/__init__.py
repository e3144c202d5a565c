"""`pipemax bench`: PipeMax and its parts, beside the machine's limit and other engines.

Nothing here imports torch but programs that run as processes of their own.
"""
