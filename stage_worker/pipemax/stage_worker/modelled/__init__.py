"""A GPU that is not at hand: catalogues, a performance model, and a stage that takes its time.

`catalogue`, `roofline` and `loads` say how long a step takes; the simulator uses them too. The rest
is `--device modelled:<gpu>`: `engine` puts it together, `step` runs steps, `pace` makes them take
their time, `kv` and `ring` hold small real blocks and rows, `marks` says what is in them and makes
tokens up.

What is real: processes, sockets, plans, pools with as many blocks as the GPU has room for, and the
daemon's copies of them, each of few bytes here and paced as its bytes there would be. Every block
that a step reads is checked before the step and after it, and output tokens are a function of the
context as it was read, so that equal tokens mean that all KV was in the right place at the right
time. Prompt and output lengths, stop tokens, stop strings and seeds mean what they always do;
top_k, top_p and min_p change nothing, as made-up tokens are all equally likely.

What is not modelled: loading weights, links that share an uplink or host memory's bandwidth, jitter
(the machine's own is there instead), and activations in the way of KV on the link.

Nothing here imports torch.
"""
