"""WHERE IT RUNS: one file per runtime, each with `LIMITS`, `export` and `load`."""
