"""Does attention over depth pay? One file a question, on one core: `python -m studies.gain --size cpu`."""
