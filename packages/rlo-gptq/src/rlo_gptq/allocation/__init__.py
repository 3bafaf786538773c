"""Which bits each layer gets within a size: probes, an exact knapsack, the curve of all sizes."""
