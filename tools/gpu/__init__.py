"""Sections of gpu_check.py, one file each: what every operator, backend and layer does on the GPU of this machine.

A section is a function of a `Report`; it finds its own inputs and knows nothing of the other sections.
"""
