"""`python -m engine`, and what `deepspeed --module engine` starts on every rank."""

import sys

from engine.cli import main

sys.exit(main(sys.argv[1:]))
