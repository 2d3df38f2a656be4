"""Speed and memory of the operations beside dense PyTorch and other libraries: `python -m benchmarks.run --help`."""
