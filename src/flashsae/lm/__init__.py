"""Language models: loading, hookpoints, the windows of text that they read, and what is at a hookpoint then."""
