"""The sections of a page, one per file."""
