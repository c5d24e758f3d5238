"""From a model to its programs: traced graphs with free sizes, call signature and guards."""
