"""Where to cut: the request, the objective and the searches."""
