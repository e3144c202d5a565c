"""Every message, by channel. A message is a map with the key `type`; see `registry.py` for the
table of who may send what on which socket."""
