"""Parts of translate_bagel_args.py: the official command line, its flags in our terms, the registry of data sets."""
