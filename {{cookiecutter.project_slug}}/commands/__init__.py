"""What manage.py's commands do. Each imports what only it needs, so that all start fast."""
