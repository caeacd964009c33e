"""The commands: each file parses its options and calls one function."""
