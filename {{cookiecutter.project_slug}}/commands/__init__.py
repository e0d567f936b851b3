"""Groups of manage.py's commands. What only one needs is imported there, so that all start fast."""
