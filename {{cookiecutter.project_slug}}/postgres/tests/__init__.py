"""The tests of this package. They know nothing of the app, and bring tables of their own."""
