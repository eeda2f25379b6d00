"""Walks the steps of any method: seeds, times, guards, checkpoints at any step, evaluates, writes events."""
