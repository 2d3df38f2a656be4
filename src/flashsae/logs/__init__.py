"""Who hears of the progress of a training: the JSONL log, a progress bar, TensorBoard, wandb."""
