"""The embedded default: fine-tune twice from one tiny base, and look at what was copied (``make demo``)."""
