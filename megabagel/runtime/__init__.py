"""Process groups, devices, random numbers and failure: what every process needs before any model or data."""
