"""Parts of tools/preflight.py."""
