"""Fine-tune twice from one tiny base model and look at what was copied (``make demo``)."""
