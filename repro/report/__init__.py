"""What the records say beside what the papers say: published numbers, statistics, verdicts, plots, notebooks, the site.

Nothing here trains or knows a study; tables go in, figures and pages come out.
"""
