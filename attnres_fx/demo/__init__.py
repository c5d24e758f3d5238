"""The demo of the command line, with its model: all that it needs is in the wheel."""
