"""Training the adapter's values over a frozen base: the loop, its optimizer, its checkpoints and its numbers."""
