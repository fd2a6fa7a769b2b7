"""Data: from wherever rows are to the samples of a step.

    sources     files, folders, hub datasets, objects     rows, messages   what a row must look like
    template    a chat template, and what it does         turns, marks     where the assistant's words stand in it
    chat        messages to token ids and mask            tokenizer        loading one, of either kind
    encoding    every row once, kept on disk              selection, tally which rows are used, and what is said of it
    order       position in the run to row                samples, batch   the samples of a step; packed batches

Knows ranks as numbers; no collectives. Imports `cluster` and what is below it. Models do not belong here.
"""
