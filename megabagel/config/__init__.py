"""Typed configuration: what can be set, which combinations are legal, how it is read. Imports nothing of ours."""
