"""IS IT TRUE: quality, parity, timing and the gate."""
