"""Reports of evaluations: tables, pictures and a page."""
