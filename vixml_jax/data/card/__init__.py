"""The data card of a prepared data set: a page of statistics and a figure.

`stats` measures the data set, `card` writes the page, `panels` gathers what figures show, `plots`
draws the figure.
"""
