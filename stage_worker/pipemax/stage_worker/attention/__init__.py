"""Attention over the paged KV pool of one stage."""
