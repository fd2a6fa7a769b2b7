"""The loss on the ZeRO-3 partitions: hidden states in, loss and gradients out, no `[tokens, vocabulary]` anywhere.

`divergence` is the table of divergences, `kernels` their element-wise part, `head` a head as blocks of vocabulary
rows, `projection` the matrix products, `signal` what a teacher says, `values` the figures of a token,
`vocab_parallel` the stream over tokens, `objective` the loss of a step.
Imports `data` (packed batches), `cluster` and `zero`. Models do not belong here: hidden states and rows come in.
"""
