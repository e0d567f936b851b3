"""What browsers show, in development: the page at /, and the documentation at /docs and /redoc."""
