"""`pipemax trace`: what every stage did, and every KV copy, as a file for trace viewers."""
