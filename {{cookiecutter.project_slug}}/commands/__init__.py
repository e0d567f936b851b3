"""What manage.py's commands do. What only one needs is imported there, so that all start fast."""
