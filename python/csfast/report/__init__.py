"""Results as plots, pages and tables."""
