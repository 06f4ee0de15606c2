"""Results for people: the report of an evaluation, the page that compares runs, curves and tables.

`page` gathers the content of the report, `sections` prepares it for the templates, and `render`
makes one file. `dashboard`, `runs` and `run_sections` do so for the page that compares runs.
"""
