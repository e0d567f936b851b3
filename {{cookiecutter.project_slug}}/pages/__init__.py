"""Pages for browsers: the page at / in development, and the documentation at /docs and /redoc."""
