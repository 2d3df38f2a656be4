"""Files that hold a trained SAE: one file a format."""
