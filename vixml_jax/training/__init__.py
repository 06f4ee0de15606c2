"""Training of a model.

The training loops and steps, losses, optimizer, checkpoints, preemption, memory plans and metrics.
"""
