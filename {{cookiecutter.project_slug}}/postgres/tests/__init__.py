"""Tests of this package. They do not depend on the app, and create their own tables."""
