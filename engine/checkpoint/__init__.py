"""Checkpoints: what a run leaves behind and goes on from.

`checkpoint` writes and loads them, `resumption` finds the one to go on from, `manifest` says what a complete folder
holds, `elastic` takes one up at another number of ranks, `changes` names what differs on a resume, `parts` is what lies
beside the weights, `run_folder` when a folder holds a run. Imports `data` and what is below it. What a step computes
does not belong here.
"""
