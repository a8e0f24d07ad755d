"""From files to samples: sources, the sample schema, order, mixture and the reader."""
