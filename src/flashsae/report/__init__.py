"""The report of a training run: one HTML file with curves, histograms and the texts that activate latents."""
