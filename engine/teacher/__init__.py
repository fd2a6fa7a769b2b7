"""The frozen teacher, which says of each micro-batch what the loss needs to know: a signal, never logits.

`interface` is what the trainer sees of any teacher, and what those that run here have in common; `placements` builds
the configured one; `offload` and `tensor_parallel` are placements of their own. All placements give the same signal.
Imports `models`, `loss` and `zero`. How a signal becomes a loss does not belong here.

A further teacher, such as one behind a server or several that a column of the data chooses from, is a subclass of
`Teacher` and a line in `placements`; where it says another thing than hidden states, or has another head per sample,
a class with the methods of `engine.loss.signal.Signal` beside it.
"""
