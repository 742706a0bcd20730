"""Pages, figures and tables made from records. Nothing here runs a model."""
