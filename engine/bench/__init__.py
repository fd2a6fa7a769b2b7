"""Measurements that a user can run: `python -m engine bench WHAT`."""

from __future__ import annotations

import argparse


def main(arguments: list[str]) -> int:
    from engine.bench import loss, rollout

    parser = argparse.ArgumentParser(prog="python -m engine bench", description=__doc__)
    benches = parser.add_subparsers(dest="bench", required=True)
    loss.add_arguments(benches.add_parser("loss", help="the streamed divergence against GEMMs and whole logits"))
    rollout.add_arguments(benches.add_parser("rollout", help="the continuous decoder against transformers' generate"))
    options = parser.parse_args(arguments)
    return {"loss": loss.run, "rollout": rollout.run}[options.bench](options)
