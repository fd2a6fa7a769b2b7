"""`python -m engine`, and what `deepspeed --module engine` starts on every rank."""

import os
import sys

from engine.cli import main

status = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
if status:
    os._exit(status)  # a process group whose peers are gone may wait for them in its destructor
sys.exit(0)
