"""A server on transformers: one frozen model, all adapters of a folder, and a page to try them."""
