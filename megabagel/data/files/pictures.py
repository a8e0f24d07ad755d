"""Which files are taken for pictures where only their name can tell: members of an archive, frames of a folder.

Whether one can be decoded is found out when it is read.
"""

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
