"""Embeds the image files that a data set or queries name, with a frozen vision tower.

Files are read and decoded on all cores ahead of the devices, which share each batch.
"""
