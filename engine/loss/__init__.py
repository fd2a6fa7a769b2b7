"""The divergence between teacher and student: maths, head rows, and the stream over vocabulary shards."""
