"""One file per published system; each function returns a plan for a base."""
