"""Training of a model.

The training loop and step, losses, optimizer, checkpoints, preemption, memory planning and metrics.
"""
