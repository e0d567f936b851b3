"""What the API answers to: one module for each kind of thing, each with a `router`."""
