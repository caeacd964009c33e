"""Pictures: PNG, SVG and PDF files."""
