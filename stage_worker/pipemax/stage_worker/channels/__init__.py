"""Activations between neighbouring stages: a shared-memory ring or TCP frames.

Both agree on everything once per epoch (`RingOffer`, `RingAccepted`); afterwards a step costs one
small message, and over TCP the rows. What the rows are made of is the device's business (`ring`):
nothing here imports torch.
"""
