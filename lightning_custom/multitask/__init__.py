"""Several losses on shared weights: weightings of losses, aggregators of gradients, batches, diagnostics."""
