"""Parts of check_parity.py: the case on disk, the model on these ranks, what is measured and how it is compared."""
