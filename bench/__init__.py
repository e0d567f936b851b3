"""How fast a generated project is, next to others: `uv run python -m bench`.

All apps give the same answers from the same data:

- *ours*: the generated project
- *session*: the same, with the task routes that tutorials write
- *textbook*: the app that tutorials lead to, with a thread for each request
- *async textbook*: the same on the event loop
- *floor*: the least that Python can do in threads
- *async floor*: the least that it can do on the event loop

They are measured in turn, so that a slow moment of the machine hits all; what counts are the
ratios between them.
"""
