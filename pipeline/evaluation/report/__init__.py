"""An evaluation as tables, plots and a page."""
