"""Rollouts: completions for a step, by the student or, for `seq_kd`, the teacher.

    rollout      deals prompts over the ranks, hands completions back, measures
    completer    what a backend is: requests in, completions out         placement   which backend a writer gets
    gathered     the whole model on every rank                           partitioned layer by layer, all in step
    decoder      forward passes: prefill, step, until all have ended     schedule    which prompts enter when
    slots        the live sequences and their cache                      cache       a KV cache that grows in place
    sampling     how a token is drawn                                    sequence    a completion in the making

Imports `models` and what is below it. How completions are trained on does not belong here.
"""
