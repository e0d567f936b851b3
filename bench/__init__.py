"""How fast a generated project is, next to two others: `uv run python -m bench`.

Three apps give the same answers from the same data: *ours*, the generated project; *textbook*, the
app that tutorials lead to; and *floor*, the least that Python can do. They are measured in turn, so
that a slow moment of the machine hits all three; what counts are the ratios between them.
"""
