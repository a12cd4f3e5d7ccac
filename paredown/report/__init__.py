"""SHOW IT: one self-contained HTML page with plots, and tables for the terminal, from one plain-JSON fact sheet."""
