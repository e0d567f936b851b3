"""Pages for browsers: / and /mailbox in development; the documentation at /docs and /redoc."""
