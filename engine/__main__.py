"""`python -m engine`, and what `deepspeed --module engine` starts on every rank."""

import os
import signal
import sys

from engine.cli import main

# Ctrl-C ends the process at once, also where it waits for another rank in a collective, which Python would
# not leave. While training, `signals.Watch` saves first.
signal.signal(signal.SIGINT, signal.SIG_DFL)
status = main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
if status:
    os._exit(status)  # a process group whose peers are gone may wait for them in its destructor
sys.exit(0)
