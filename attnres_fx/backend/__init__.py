"""AttnRes as a `torch.compile` backend: attach, compile, explain."""
