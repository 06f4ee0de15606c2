"""The data card of a prepared data set: a page of statistics and a figure.

`stats` measures the data set, `card` writes the page, `plots` draws the figure.
"""
