"""Results for people: the HTML report of an evaluation, learning curves and tables of metrics.

`page` gathers the content, `sections` prepares it for the templates, and `render` makes one file.
"""
