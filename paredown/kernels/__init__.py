"""Our own CPU kernels, generated for the CPU at hand."""
