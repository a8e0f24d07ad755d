"""How good a model's answers and pictures are: tasks read from files, scores from well-known libraries, and reports."""
