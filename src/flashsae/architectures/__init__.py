"""The architectures, one file each. A new file here is found by its name: it defines ARCHITECTURE."""
