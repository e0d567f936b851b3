"""Benchmark a generated project against other apps: `uv run python -m bench`.

All apps return the same responses from the same data:

- *ours*: the generated project
- *session*: the generated project, with task routes as tutorials write them
- *textbook*: the app that tutorials lead to, with a thread per request
- *async textbook*: the textbook app on the event loop
- *floor*: the minimum work that Python needs, in threads
- *async floor*: the same on the event loop

The apps are measured in turn, so that a slow moment of the machine affects all of them. Compare
the ratios, not the absolute numbers.
"""
