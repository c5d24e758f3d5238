"""What a graph says: operations, aliasing, the tools that read and change nodes."""
