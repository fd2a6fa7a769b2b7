"""Rollouts: completions for a step, by the student or, for `seq_kd`, the teacher.

`rollout` deals prompts over the ranks and hands completions back; `decoder` decodes, with the `cache`. Imports
`models` and what is below it. How completions are trained on does not belong here.
"""
