"""Models: loading them, what their classes do, the student under ZeRO-3, and their way out as Hugging Face folders.

Imports `loss` (the student's head is computed on there) and what is below it. The teacher's placements and decoding
have rooms of their own.
"""
