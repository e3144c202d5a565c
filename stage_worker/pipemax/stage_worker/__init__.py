"""A stage worker: one process, one run of layers, steps in order.

`main` puts the parts together; `executor` is the work loop, `shell` its sockets, `step_queue` what
it was told, `model_step` what it computes, `state_clock` where its time goes. `channels` carry
activations between stages and logits to samplers, `devices` hide the hardware, `model` and
`attention` are the numerics. `sampling` is the way from logits to tokens, on the last stage or,
with `--sampler-workers`, in processes of its own (`sampling.main`). Imports nothing here: the
launcher uses `channels.keys` and must stay free of torch.
"""
