"""Select over a batch: the B·k largest pre-activations, or all above a threshold."""
