"""The parts of tools/prepare_demo.py, one per file.

emojis, captions, edits and questions make the samples; packages fetches what they need; formats writes the files.
Not an interface of the trainer.
"""
