"""Activations between neighbouring stages: a shared-memory ring or TCP frames.

Both agree on everything once per epoch (`RingOffer`, `RingAccepted`); afterwards a step costs one
small message, and over TCP the rows. The launcher imports `channels.keys` and must stay free of
torch: import nothing here.
"""
