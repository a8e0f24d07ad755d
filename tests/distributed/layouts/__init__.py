"""The table of parallel layouts: worker processes, the packs they train on, what is compared. Tests are beside it."""
