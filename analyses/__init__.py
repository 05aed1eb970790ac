"""One file per analysis; each defines `ANALYSIS`."""
