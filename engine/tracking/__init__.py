"""Tracking: what a run says of itself: metrics, trackers, progress, seconds, FLOPs, and steps that were not finite.

Imports `checkpoint` (it uses the run's state) and what is below it. Nothing here decides what a step does.
"""
