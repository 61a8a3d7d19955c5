"""The report of a comparison: rows of `veiltune.study_summary` as tables, figures and a page. Nothing is measured here."""
