"""Groups of manage.py's commands. What only one needs, it imports inside, so that all start fast."""
