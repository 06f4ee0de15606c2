"""Planned and measured memory: of a training step (the command), and of whole runs (`runs`)."""
