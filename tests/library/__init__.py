"""What several tests use: places, tiny models, ranks, runs and what they wrote. No test imports another test."""
