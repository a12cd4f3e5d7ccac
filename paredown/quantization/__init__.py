"""FEWER BITS: one file per number format."""
