"""`convert` and `inspect`, the converted model, its report, its check and its files."""
