"""The tests of the app."""
