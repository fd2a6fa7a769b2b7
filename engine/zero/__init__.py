"""ZeRO: the one room that knows DeepSpeed's insides.

`partitions` reads and writes the pieces of ZeRO-3 parameters, gradients and checkpoints, with each private part of
DeepSpeed that it touches named; `settings` is where DeepSpeed's JSON meets the configuration, `deepspeed_json` which
keys that JSON may have. Imports the configuration and nothing else of the engine. What a model, a loss or a
process group is does not belong here.

This file imports nothing, so that settings can be read without torch.
"""
