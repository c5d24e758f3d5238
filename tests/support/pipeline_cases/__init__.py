"""Cases that the processes of a pipeline run, by theme."""
